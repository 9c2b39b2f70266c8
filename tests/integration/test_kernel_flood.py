"""As many displays in one cell as nobody counts: the messages themselves, which nothing may join or drop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.local_sandbox import LocalSandbox
from tests.unit.test_kernel_floods import BARE_DISPLAYS, numbers


@pytest.mark.limit(300)
def test_200000_displays(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        shown = sandbox.finish_cell(sandbox.start_cell(BARE_DISPLAYS.format(200_000)), timeout=280)
        assert len(shown.messages) == 200_000
        assert numbers(shown) == list(range(200_000))
