"""`jupyter_kernel_test`, the suite that kernels' authors hold their kernels to, on the `sandbox` kernelspec."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import jupyter_kernel_test  # not its classes: pytest would collect them here
import pytest

from tests.conformance.conftest import Place
from tests.waiting import until

pytestmark = pytest.mark.conformance


class SandboxKernelTests(jupyter_kernel_test.KernelTests):
    """Every sample that the suite can use is given, so that it skips nothing."""

    __test__ = False  # pytest's own collection would start it without a place to run in

    kernel_name = "sandbox"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar[list[dict[str, Any]]] = [
        {"text": "zi", "matches": ["zip"]},
        {"text": "import socke", "matches": ["socket", "socketserver"]},
    ]
    complete_code_samples: ClassVar[list[str]] = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]
    incomplete_code_samples: ClassVar[list[str]] = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples: ClassVar[list[str]] = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('as asked')"
    code_execute_result: ClassVar[list[dict[str, str]]] = [
        {"code": "6*7", "result": "42"},
        {"code": "'ä'", "result": "'ä'"},
        {"code": "5*9", "result": "45"},
    ]
    code_display_data: ClassVar[list[dict[str, str]]] = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
        {"code": "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", "mime": "image/png"},
    ]
    code_history_pattern = "6*7"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class SandboxWelcomeTests(jupyter_kernel_test.IopubWelcomeTests):
    """A subscriber of iopub hears when it is one."""

    __test__ = False

    kernel_name = "sandbox"
    support_iopub_welcome = True

    @classmethod
    def tearDownClass(cls) -> None:
        # The welcome comes at once: the heartbeat's thread may not have made its socket yet, and fails behind the end.
        until(lambda: cls.kc.hb_channel.socket is not None)
        super().tearDownClass()


@pytest.mark.parametrize(("tests", "count"), [(SandboxKernelTests, 12), (SandboxWelcomeTests, 1)])
def test_the_whole_suite(
    place: Place, monkeypatch: pytest.MonkeyPatch, tests: type[unittest.TestCase], count: int
) -> None:
    monkeypatch.chdir(place.directory)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(tests).run(result)
    assert [(str(test), text) for test, text in (*result.errors, *result.failures)] == []
    assert result.skipped == []
    assert result.testsRun == count
