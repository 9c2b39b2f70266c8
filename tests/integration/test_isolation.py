"""What user code in a real container cannot do, seen from inside through the REST interface."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_process import KEY, GatewayProcess

pytestmark = pytest.mark.service


def answer_of(gateway: GatewayProcess, code: str, session_id: str | None = None) -> Any:
    """Run code that prints one JSON value, and return it."""
    result = gateway.exec(code, session_id)
    assert result["status"] == "ok", result
    return json.loads(result["stdout"])


def test_there_is_no_network(gateway: GatewayProcess) -> None:
    code = f"""
import json, socket
def attempt(address):
    try:
        socket.create_connection(address, timeout=2).close()
        return "connected"
    except OSError as error:
        return type(error).__name__
names = [name for _, name in socket.if_nameindex()]
print(json.dumps([names, attempt(("127.0.0.1", {gateway.port})), attempt(("192.0.2.1", 80)), attempt(("8.8.8.8", 53))]))
"""
    names, loopback, *outside = answer_of(gateway, code)
    assert names == ["lo"]
    assert loopback == "ConnectionRefusedError"
    assert all(result != "connected" for result in outside)


def test_it_is_nobody_without_capabilities_or_a_way_to_gain_any(gateway: GatewayProcess) -> None:
    code = """
import ctypes, json, os
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    return result == -1
print(json.dumps({
    "uid": os.getuid(), "euid": os.geteuid(),
    "capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "setuid": refused(libc.setuid(0)),
    "unshare": refused(libc.unshare(0x10000000)),
    "mount": refused(libc.mount(b"none", b"/mnt/data", b"tmpfs", 0, None)),
}))
"""
    facts = answer_of(gateway, code)
    assert facts["uid"] == facts["euid"] != 0
    assert set(facts["capabilities"]) == {"0000000000000000"}
    assert facts["no_new_privileges"] == "1"
    assert facts["seccomp"] == "2"
    assert facts["setuid"] and facts["unshare"] and facts["mount"]


def test_only_work_directory_and_scratch_can_be_written(gateway: GatewayProcess) -> None:
    code = """
import json, os
written = []
for directory, names, _ in os.walk("/", onerror=None):
    names[:] = [name for name in names if os.path.join(directory, name) not in ("/proc", "/sys")]
    path = os.path.join(directory, ".samovar-probe")
    try:
        open(path, "x").close()
        os.unlink(path)
        written.append(directory)
    except OSError:
        continue
print(json.dumps(written))
"""
    written = set(answer_of(gateway, code))
    roots = {"/mnt/data", "/tmp", "/dev/shm"}
    assert {"/mnt/data", "/tmp"} <= written
    assert {path for path in written if not any(path == root or path.startswith(root + "/") for root in roots)} == set()


@pytest.mark.parametrize("directory", ["/mnt/data", "/tmp"])
def test_a_full_directory_is_an_error_in_the_cell_and_the_sandbox_lives(
    gateway: GatewayProcess, directory: str
) -> None:
    code = f"""
kept = "still here"
import errno, os
try:
    with open("{directory}/full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno])
finally:
    os.unlink("{directory}/full")
"""
    first = gateway.exec(code)
    assert first["stdout"] == "ENOSPC\n"
    assert gateway.exec("print(kept)", first["session_id"])["stdout"] == "still here\n"


def test_a_counted_fork_bomb_meets_the_limit_and_the_session_lives(gateway: GatewayProcess) -> None:
    code = """
import os, time, signal
kept, children = "still here", []
try:
    for _ in range(2000):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
except OSError as error:
    print("limit", type(error).__name__, len(children) < 2000)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    first = gateway.exec(code)
    assert first["stdout"] == "limit BlockingIOError True\n"
    assert gateway.exec("print(kept)", first["session_id"])["stdout"] == "still here\n"


def test_the_gateways_secrets_are_not_in_its_environment_or_files(gateway: GatewayProcess) -> None:
    code = """
import json, os
texts = [json.dumps(dict(os.environ))]
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try:
            texts.append(open(f"/proc/{pid}/{name}", errors="replace").read())
        except OSError:
            pass
closed = []
for name, mode in (("environ", "rb"), ("mem", "rb"), ("mem", "r+b"), ("maps", "rb"), ("auxv", "rb")):
    try:
        open(f"/proc/1/{name}", mode).close()
    except PermissionError:
        closed.append(name)
try:
    os.listdir("/proc/1/fd")
except PermissionError:
    closed.append("fd")
first = open(f"/proc/{os.getpid()}/oom_score_adj").read().strip()
print(json.dumps(["\\n".join(texts), len([p for p in os.listdir("/proc") if p.isdigit()]), closed, first]))
"""
    text, processes, closed, first = answer_of(gateway, code)
    assert closed == ["environ", "mem", "mem", "maps", "auxv", "fd"], "PID 1 holds the token of its own stream"
    assert '"token"' not in text
    assert first == "500", "the kernel is to go before PID 1 when memory runs out"
    assert KEY not in text
    assert str(gateway.directory) not in text
    assert processes <= 4


def test_a_stopped_supervisor_is_told_as_what_it_is_and_no_output_is_lost(gateway: GatewayProcess) -> None:
    result = gateway.exec("import os, time; print('pre'); os.kill(1, 15); time.sleep(60)")
    assert result["status"] == "died"
    assert result["stdout"] == "pre\n"
    assert "SIGTERM" in json.dumps(result)


def test_sessions_see_nothing_of_each_other(gateway: GatewayProcess) -> None:
    secret = "open('/mnt/data/mine','w').write('secret-of-one'); open('/tmp/mine','w').write('secret-of-one'); mine = 1"
    one = gateway.exec(secret)
    code = """
import json, os
walked = (entry for entry in os.walk("/") if not entry[0].startswith(("/proc", "/sys")))
found = [os.path.join(directory, name) for directory, _, files in walked for name in files if name == "mine"]
print(json.dumps([found, "mine" in globals(), sorted(os.listdir("/samovar"))]))
"""
    two = gateway.exec(code)
    found, variable, sockets = json.loads(two["stdout"])
    assert one["session_id"] != two["session_id"]
    assert one["container_id"] != two["container_id"]
    assert found == [] and variable is False
    assert sockets == ["k-1", "k-2", "k-3", "k-4", "k-5", "sup"]


def test_the_sockets_cannot_be_replaced_once_the_sandbox_is_claimed(gateway: GatewayProcess) -> None:
    code = """
import json, os
outcomes = {}
def attempt(name, action):
    try:
        action()
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = error.errno
attempt("unlink", lambda: os.unlink("/samovar/k-1"))
attempt("rename", lambda: os.rename("/samovar/k-1", "/samovar/k-9"))
attempt("create", lambda: open("/samovar/new", "w"))
attempt("link", lambda: os.symlink("/var/run/docker.sock", "/samovar/link"))
attempt("chmod", lambda: os.chmod("/samovar", 0o777))
print(json.dumps(outcomes))
"""
    assert "done" not in answer_of(gateway, code).values()


def test_protocol_on_stdout_stderr_or_in_files_is_text(gateway: GatewayProcess) -> None:
    code = r"""
import os, json
frame = b"\x00\x00\x00\x1f\x00\x00\x00\x00" + b'{"event":"exit","code":0,"signal":null}'
idle = b'<IDS|MSG>' + b'x' * 64 + b'{"msg_type":"status"}{"execution_state":"idle"}'
for fd in (1, 2):
    os.write(fd, frame + idle + b"\n")
open("/mnt/data/sup", "wb").write(frame)
print("after")
"""
    result = gateway.exec(code)
    assert result["status"] == "ok"
    assert result["stdout"].endswith("after\n")
    assert '{"event":"exit","code":0,"signal":null}' in result["stdout"]
    assert '"execution_state":"idle"' in result["stderr"]
    assert gateway.exec("print('lives')", result["session_id"])["stdout"] == "lives\n"


FORGERIES = {
    "lengths of 10 GB and noise on every descriptor it has": """
import os, struct
for fd in range(3, 256):
    for noise in (struct.pack(">BQ", 2, 10 * 2**30), os.urandom(4096)):
        try:
            os.write(fd, noise)
        except OSError:
            pass
""",
    "short texts that describe millions of objects": """
from IPython import get_ipython
kernel = get_ipython().kernel
session, parent = kernel.session, kernel.get_parent("shell")["header"]
bomb = b'{"a":[' + b"[]," * 5_000_000 + b'[]]}'
for kind, field in (("display_data", b"data"), ("display_data", b"metadata"), ("stream", b"name"), ("error", b"x")):
    parts = [session.pack(session.msg_header(kind)), session.pack(parent), b"{}", b'{"%s":%s}' % (field, bomb)]
    kernel.iopub_socket.send_multipart([b"<IDS|MSG>", session.sign(parts), *parts])
""",
    "frames on every descriptor it has": """
import os, struct
for fd in range(3, 256):
    try:
        os.write(fd, struct.pack(">II", 2**31, 2**31) + b"\\xff" * 64)
    except OSError:
        pass
""",
    "a second client of the supervisor": """
import os, socket, struct, time
for payload in (b"\\x00" * 8, struct.pack(">II", 10 * 2**20, 0), os.urandom(4096), b'{"op":"exit"}'):
    for _ in range(20):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(1)
        try:
            s.connect("/samovar/sup")
            s.sendall(payload)
            s.recv(100)
        except OSError:
            pass
        s.close()
""",
    "fake idle and reply for the running cell, wrong parents, torn messages": """
import time
from IPython import get_ipython
kernel = get_ipython().kernel
for parent in (kernel.get_parent("shell"), {}, {"header": {"msg_id": "somebody-else"}}):
    kernel.session.send(kernel.iopub_socket, "status", {"execution_state": "idle"}, parent=parent)
    kernel.session.send(kernel.iopub_socket, "execute_reply", {"status": "ok"}, parent=parent)
    kernel.session.send(kernel.iopub_socket, "stream", {"name": 7, "text": ["no"]}, parent=parent)
    kernel.session.send(kernel.iopub_socket, "display_data", {"data": None}, parent=parent)
for frames in ([b""], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"x", b"{", b"[", b"", b""], [b"a"] * 50):
    kernel.iopub_socket.send_multipart(frames)
""",
    "a flood of other sessions' ids": """
from IPython import get_ipython
kernel = get_ipython().kernel
for n in range(3000):
    kernel.session.send(kernel.iopub_socket, "stream", {"name": "stdout", "text": "x" * 1000},
                        parent={"header": {"msg_id": str(n), "session": str(n)}})
""",
    "one message of endless parts": """
from IPython import get_ipython
kernel = get_ipython().kernel
kernel.iopub_socket.send_multipart([b"x" * 1000] * 100_000)
""",
    "a message larger than any bound": """
from IPython import get_ipython
kernel = get_ipython().kernel
kernel.iopub_socket.send_multipart([b"x" * (100 << 20)])
""",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_frames_hurt_their_own_session_only(gateway: GatewayProcess, forgery: str) -> None:
    bystander = gateway.exec("kept = 'untouched'")["session_id"]
    # It comes back: in a full pool what nobody came back to has to make room.
    gateway.exec("kept", bystander)
    before = gateway.memory()
    result = gateway.exec(FORGERIES[forgery] + "\nprint('forged')")
    assert result["status"] in ("ok", "error", "died", "timeout")
    assert gateway.exec("print(kept)", bystander)["stdout"] == "untouched\n"
    assert gateway.call("GET", "/health").status == 200
    assert gateway.memory() - before < 256 << 20
