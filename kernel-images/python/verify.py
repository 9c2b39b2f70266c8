"""`samovar images verify python` runs this in a locked-down sandbox of the image; exit code 1 if anything fails.

Imports the top-level modules of every installed package, and uses what people use.
"""

import importlib
import importlib.metadata
import io
import os
import pathlib
import subprocess
import sys
import time
import traceback
import warnings

warnings.simplefilter("ignore")
failures = 0


def check(what, action):
    """Run one check and print its outcome; `action` may return a remark."""
    global failures
    began = time.perf_counter()
    try:
        remark = action()
    except Exception:
        failures += 1
        print(f"FAILED {what}\n{traceback.format_exc(limit=-3)}", flush=True)
        return
    took = (time.perf_counter() - began) * 1000
    print(f"ok     {what}{f': {remark}' if remark else ''} ({took:.0f} ms)", flush=True)


def import_all():
    names = sorted(n for n in importlib.metadata.packages_distributions() if n.isidentifier() and not n.startswith("_"))
    broken = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken.append(f"{name}: {error!r}")
    assert not broken, "; ".join(broken)
    return f"{len(names)} modules"


def import_deep():
    names = """
        scipy.linalg scipy.optimize scipy.sparse scipy.stats scipy.signal sklearn.ensemble sklearn.linear_model
        sklearn.model_selection sklearn.datasets statsmodels.api statsmodels.formula.api pyarrow.parquet pyarrow.feather
        lxml.etree lxml.html PIL.Image openpyxl sympy.plotting ipykernel.kernelapp ipywidgets debugpy.server
        numpy.testing pandas.testing matplotlib.animation mpl_toolkits.mplot3d sqlite3 ssl ctypes zoneinfo
        samovar_kernel.supervisor samovar_kernel.app
    """
    for name in names.split():
        importlib.import_module(name)
    return f"{len(names.split())} modules"


def plot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.font_manager
    import matplotlib.pyplot as plt

    directory = matplotlib.get_cachedir()
    assert directory == os.environ["MPLCONFIGDIR"], f"the font cache was not used: {directory}"
    assert matplotlib.font_manager.fontManager.ttflist
    plt.plot([1, 3, 2])
    plt.title("ä ∑ x²")
    image = io.BytesIO()
    plt.savefig(image)
    return f"{len(image.getvalue())} bytes of PNG"


def files():
    import pandas

    frame = pandas.DataFrame({"a": [1, 2, 3], "b": ["x", "y", None]})
    for name in ("parquet", "feather", "excel", "json", "csv"):
        path = f"/mnt/data/t.{ {'excel': 'xlsx'}.get(name, name) }"
        index = {} if name in ("parquet", "feather", "json") else {"index": False}
        getattr(frame, f"to_{name}")(path, **index)
        assert len(getattr(pandas, f"read_{name}")(path)) == 3, name


def regression():
    import numpy
    import sklearn.datasets
    import sklearn.ensemble
    import statsmodels.formula.api as smf

    data = sklearn.datasets.load_diabetes(as_frame=True).frame
    model = smf.ols("target ~ bmi + bp", data).fit()
    forest = sklearn.ensemble.RandomForestRegressor(20, n_jobs=2, random_state=0).fit(data[["bmi", "bp"]], data.target)
    assert numpy.isfinite(model.rsquared) and forest.score(data[["bmi", "bp"]], data.target) > 0.5
    return f"R² {model.rsquared:.2f}"


def processes():
    import concurrent.futures
    import multiprocessing

    assert subprocess.run(["sh", "-c", "echo hi"], capture_output=True, text=True).stdout == "hi\n"
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(abs, range(100))) == 4950


def kernel_sockets():
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        server.bind("ipc:///tmp/verify")
        client.connect("ipc:///tmp/verify")
        client.send(b"hello")
        assert server.recv_multipart()[1] == b"hello"


def debugger():
    import socket

    import debugpy

    with socket.create_connection(debugpy.listen(("127.0.0.1", 0)), timeout=5) as client:
        assert b"Content-Length" in client.recv(100)


def locked():
    assert os.getuid() != 0
    for path in ("/opt/kernel/x", "/etc/x", "/x", "/usr/x"):
        try:
            open(path, "w").close()
        except OSError:
            continue
        raise AssertionError(f"{path} could be written")
    import socket

    try:
        socket.create_connection(("192.0.2.1", 80), timeout=2)
    except OSError:
        pass
    else:
        raise AssertionError("there is a network")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, "capabilities"
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", "seccomp or no_new_privs"


def bytecode():
    """Every module imported from the image had its bytecode: nothing is compiled at run time."""
    lacking = [
        name
        for name, module in sys.modules.items()
        if getattr(module, "__cached__", None)
        and module.__file__.endswith(".py")
        and module.__file__.startswith("/opt/")
        and not os.path.exists(module.__cached__)
    ]
    assert not lacking, lacking[:10]


check("locked down", locked)
check("plot with the prepared font cache", plot)
check("every package", import_all)
check("their parts", import_deep)
check("files in and out", files)
check("statistics", regression)
check("processes and threads", processes)
check("ZeroMQ over ipc", kernel_sockets)
check("debugger over the loopback", debugger)
check("bytecode", bytecode)
sys.exit(1 if failures else 0)
