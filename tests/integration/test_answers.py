"""Each cell gets exactly one answer, with the output so far and the cause in words; output comes whole and in order."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import time

import pytest

from tests.gateway_process import KEY, GatewayProcess

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def gateway_settings() -> dict[str, str]:
    """A short time limit, so that what has to be killed is killed soon."""
    return {"CONTAINER_POOL_PY_MIN": "2", "CONTAINER_POOL_PY_MAX": "6", "MAX_EXECUTION_TIME": "5"}


def test_the_answer_has_the_whole_shape(gateway: GatewayProcess) -> None:
    result = gateway.exec("x = 20\nprint('hello')\nx + 1")
    assert {"session_id", "files", "stdout", "stderr", "has_state", "state_size", "state_hash"} <= result.keys()
    assert {"status", "outputs", "execution_count", "exit_cause", "timings", "container_id"} <= result.keys()
    assert (result["stdout"], result["stderr"], result["status"]) == ("hello\n", "", "ok")
    assert result["execution_count"] == 1
    assert result["outputs"] == [
        {"output_type": "stream", "name": "stdout", "text": "hello\n"},
        {"output_type": "execute_result", "data": {"text/plain": "21"}, "metadata": {}, "execution_count": 1},
    ]
    again = gateway.exec("x + 2", result["session_id"])
    assert (again["stdout"].strip(), again["execution_count"]) == ("22", 2)
    assert again["container_id"] == result["container_id"]


def test_a_new_session_looks_like_a_new_kernel(gateway: GatewayProcess) -> None:
    code = """
import sys
names = sorted(n for n in globals() if not n.startswith('_'))
print(names, In[:-1], Out, repr(_), repr(__), repr(___), sys.argv[1:])
"""
    assert gateway.exec(code)["stdout"] == (
        "['In', 'Out', 'exit', 'get_ipython', 'open', 'quit', 'sys'] [''] {} '' '' '' []\n"
    )


def test_arguments_are_those_of_the_call(gateway: GatewayProcess) -> None:
    first = gateway.exec("import sys; print(sys.argv[1:])", args=["a b", "$HOME", "ü"])
    assert first["stdout"] == "['a b', '$HOME', 'ü']\n"
    assert gateway.exec("print(sys.argv[1:])", first["session_id"])["stdout"] == "[]\n"


def test_every_way_of_printing_arrives_in_order_and_unchanged(gateway: GatewayProcess) -> None:
    code = r"""
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None)
for n in range(20):
    print(f"  print {n}\t\x1b[1mbold\x1b[0m")
    os.write(1, b"os.write %d\n" % n)
    subprocess.run(["printf", f"subprocess {n}\\n"])
    libc.puts(b"c level %d" % n)
    libc.fflush(None)
    sys.stdout.write(f"nul \0 {n}\n")
"""
    expected = "".join(
        f"  print {n}\t\x1b[1mbold\x1b[0m\nos.write {n}\nsubprocess {n}\nc level {n}\nnul \0 {n}\n" for n in range(20)
    )
    result = gateway.exec(code)
    assert result["stdout"] == expected
    assert result["stderr"] == ""


def test_bytes_that_are_no_text_become_replacement_characters(gateway: GatewayProcess) -> None:
    result = gateway.exec(r"import os; os.write(1, b'a\xff\xfeb\n'); print('\udc80')")
    assert result["stdout"] == "a��b\n"
    assert result["status"] == "error" and "UnicodeEncodeError" in result["stderr"]


def test_streams_keep_their_order_between_each_other(gateway: GatewayProcess) -> None:
    code = "import sys\nfor n in range(5):\n    print(n)\n    print(n, file=sys.stderr)"
    outputs = gateway.exec(code)["outputs"]
    assert [(output["name"], output["text"]) for output in outputs] == [
        (name, f"{n}\n") for n in range(5) for name in ("stdout", "stderr")
    ]


@pytest.mark.parametrize(
    "code",
    [
        "for _ in range(100): print('x' * 1_048_575)",
        "import os\nblock = b'x' * 1048575 + b'\\n'\nfor _ in range(100): os.write(1, block)",
        "import subprocess; subprocess.run(['head', '-c', '104857600', '/dev/zero'])",
    ],
)
def test_a_hundred_megabytes_are_cut_with_a_notice_and_the_gateway_stays_small(
    gateway: GatewayProcess, code: str
) -> None:
    before = gateway.memory()
    result = gateway.exec("kept = 1\n" + code)
    assert result["status"] == "ok", result["stderr"][-500:]
    assert len(result["stdout"]) < 16 << 20
    assert "was cut here" in result["stdout"][-300:]
    assert gateway.memory() - before < 128 << 20
    assert gateway.exec("print(kept)", result["session_id"])["stdout"] == "1\n"


def test_an_endless_loop_is_interrupted_and_keeps_its_variables(gateway: GatewayProcess) -> None:
    started = time.monotonic()
    result = gateway.exec("kept = 'variables'\nprint('before')\nwhile True: pass")
    assert time.monotonic() - started < 15
    assert (result["status"], result["stdout"]) == ("timeout", "before\n")
    assert result["exit_cause"]["cause"] == "time_limit"
    assert "5 s" in result["stderr"]
    assert gateway.exec("print(kept)", result["session_id"])["stdout"] == "variables\n"


def test_an_endless_print_is_interrupted(gateway: GatewayProcess) -> None:
    result = gateway.exec("kept = 7\nwhile True: print('flood' * 20)")
    assert result["status"] == "timeout"
    assert gateway.exec("print(kept)", result["session_id"])["stdout"] == "7\n"


def test_a_cell_that_swallows_the_interrupt_is_killed_and_says_so(gateway: GatewayProcess) -> None:
    # Not `while True: pass` within: CPython 3.11 does not let a handler catch what is raised at that jump itself.
    code = (
        "import time\nprint('before')\nwhile True:\n    try:\n        while True: time.sleep(0.01)\n"
        "    except KeyboardInterrupt: pass"
    )
    started = time.monotonic()
    result = gateway.exec(code)
    assert time.monotonic() - started < 25
    assert (result["status"], result["stdout"]) == ("timeout", "before\n")
    assert "killed" in result["stderr"]
    gone = gateway.call("POST", "/exec", {"code": "1", "lang": "py", "session_id": result["session_id"]})
    assert gone.status == 200 and gone.body["container_id"] != result["container_id"]


@pytest.mark.parametrize(
    ("code", "cause", "words"),
    [
        ("import os; os._exit(1)", "exited", "exit code 1"),
        ("import ctypes; ctypes.string_at(0)", "signal", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal", "SIGKILL"),
        ("x = bytearray(2 << 30)\nx[::4096] = b'y' * len(x[::4096])", "out_of_memory", "limit"),
    ],
)
def test_a_death_is_answered_with_the_output_so_far_and_its_cause(
    gateway: GatewayProcess, code: str, cause: str, words: str
) -> None:
    result = gateway.exec("print('before', flush=False)\nimport os; os.write(1, b'raw\\n')\n" + code)
    assert result["stdout"] == "before\nraw\n"
    assert result["status"] == "died"
    assert result["exit_cause"]["cause"] == cause
    assert words in result["stderr"]


def test_a_cell_that_ends_its_own_supervisor_gets_one_answer(gateway: GatewayProcess) -> None:
    result = gateway.exec("import os, signal, time\nfor n in (9, 15, 2): os.kill(1, n)\ntime.sleep(60)")
    assert result["status"] in ("died", "timeout") and result["exit_cause"]["text"]
    assert gateway.exec("print('next')")["stdout"] == "next\n"


def test_sys_exit_ends_the_cell_only(gateway: GatewayProcess) -> None:
    result = gateway.exec("kept = 1\nprint('before')\nimport sys; sys.exit(3)")
    assert (result["status"], result["stdout"]) == ("error", "before\n")
    assert "SystemExit: 3" in result["stderr"]
    assert gateway.exec("print(kept)", result["session_id"])["stdout"] == "1\n"


def test_input_is_refused_at_once(gateway: GatewayProcess) -> None:
    result = gateway.exec("print('before'); input('name?')")
    assert (result["status"], result["stdout"]) == ("error", "before\n")
    assert "StdinNotImplementedError" in result["stderr"]


def test_what_was_printed_before_a_hard_death_is_never_lost(gateway: GatewayProcess) -> None:
    def last_words(number: int) -> str:
        result = gateway.exec(f"for n in range(50): print({number}, n)\nimport os; os._exit(7)")
        assert result["exit_cause"]["exit_code"] == 7
        return str(result["stdout"])

    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        answers = list(callers.map(last_words, range(8)))
    assert answers == ["".join(f"{number} {n}\n" for n in range(50)) for number in range(8)]


def test_a_client_that_hangs_up_interrupts_its_cell(gateway: GatewayProcess) -> None:
    session = gateway.exec("import time; ended = None")["session_id"]
    code = "begun = time.time()\ntry:\n    time.sleep(4.5)\nfinally:\n    ended = time.time() - begun"
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=5)
    body = json.dumps({"code": code, "lang": "py", "session_id": session})
    connection.request("POST", "/exec", body, {"x-api-key": KEY, "Content-Type": "application/json"})
    time.sleep(0.7)
    connection.close()
    result = gateway.exec("print(ended)", session)
    assert float(result["stdout"]) < 3


def test_environments_of_two_sessions_that_start_at_once_stay_apart(gateway: GatewayProcess) -> None:
    code = "import json, os; print(json.dumps(dict(os.environ)))"

    def environment(number: int) -> dict[str, str]:
        body = {"code": code, "language": "python", "env": {"MINE": str(number), f"ONLY_{number}": "x"}}
        answer = gateway.call("POST", "/api/v1/execute", body)
        assert answer.status == 200, answer
        text = "".join(output["text"] for output in answer.body["outputs"] if output["output_type"] == "stream")
        seen: dict[str, str] = json.loads(text)
        return seen

    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        one, two = callers.map(environment, (1, 2))
    assert (one["MINE"], two["MINE"]) == ("1", "2")
    assert "ONLY_2" not in one and "ONLY_1" not in two
    for seen in (one, two):
        assert (
            not {"API_KEY", "SAMOVAR_DATA_DIR", "DOCKER_BASE_URL", "SAMOVAR_SUPERVISOR", "SAMOVAR_KERNEL"} & seen.keys()
        )
        assert KEY not in seen.values()


def test_requests_to_one_session_run_in_the_order_of_arrival(gateway: GatewayProcess) -> None:
    session = gateway.exec("import time; order = []")["session_id"]

    def append(number: int) -> None:
        time.sleep(number * 0.15)
        gateway.exec(f"time.sleep(0.3); order.append({number})", session)

    with concurrent.futures.ThreadPoolExecutor(5) as callers:
        list(callers.map(append, range(5)))
    assert gateway.exec("print(order)", session)["stdout"] == "[0, 1, 2, 3, 4]\n"


def test_sessions_are_listed_and_deleted_by_their_owner(gateway: GatewayProcess) -> None:
    session = gateway.exec("1")["session_id"]
    assert session in {entry["session_id"] for entry in gateway.call("GET", "/api/v1/sessions").body["sessions"]}
    assert gateway.call("GET", f"/api/v1/sessions/{session}").status == 200
    assert gateway.call("DELETE", f"/api/v1/sessions/{session}").status == 204
    assert gateway.call("GET", f"/api/v1/sessions/{session}").status == 404


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/exec", {"code": "1", "lang": "cobol"}, "lang"),
        ("/exec", {"lang": "py"}, "code"),
        ("/exec", {"code": 7, "lang": "py"}, "code"),
        ("/exec", {"code": "", "lang": "py"}, "code"),
        ("/exec", {"code": "1", "lang": "py", "entity_id": "no spaces"}, "entity_id"),
        ("/exec", {"code": "1", "lang": "py", "session_id": 5}, "session_id"),
        ("/api/v1/execute", {"code": "1", "language": "cobol"}, "language"),
        ("/api/v1/execute", {"code": "1", "language": "python", "timeout": -1}, "timeout"),
        ("/api/v1/execute", {"code": "1", "language": "python", "env": {"A": 1}}, "env"),
        ("/api/v1/execute", {"language": "python"}, "code"),
    ],
)
def test_bad_requests_are_4xx_that_name_the_field(
    gateway: GatewayProcess, path: str, body: dict[str, object], field: str
) -> None:
    answer = gateway.call("POST", path, body)
    assert answer.status in (400, 422), answer
    assert field in json.dumps(answer.body)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_bodies_that_are_no_object_are_4xx(gateway: GatewayProcess, raw: bytes) -> None:
    for path in ("/exec", "/api/v1/execute"):
        assert 400 <= gateway.call("POST", path, raw=raw).status < 500


def test_without_a_valid_key_there_is_only_health(gateway: GatewayProcess) -> None:
    for key in ("", "wrong", KEY[:-1], KEY + "x", "ключ".encode().decode("latin-1")):
        assert gateway.call("POST", "/exec", {"code": "1", "lang": "py"}, headers={"x-api-key": key}).status == 401
        assert gateway.call("GET", "/api/v1/sessions", headers={"x-api-key": key}).status == 401
    assert gateway.call("GET", "/health", headers={"x-api-key": ""}).status == 200
    assert gateway.call("POST", "/exec", {"code": "1", "lang": "py"}).status == 200
