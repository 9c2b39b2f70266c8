"""The pure parts of the benchmarks: what samples are summed up to, and what the tables say."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import closed_loop, report
from benchmarks.client import ExecClient, pause_of
from benchmarks.closed_loop import LiveSession
from benchmarks.figures import Quantity, figure, figures_table
from benchmarks.levels import Level, load_table, summary, unit
from benchmarks.load import check
from benchmarks.percentiles import percentile

VERSIONS = {"cpus": 2, "engine": "1", "python": "3", "ipykernel": "7", "pyzmq": "27"}


# --- percentiles and figures ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_the_smallest_sample_that_covers_its_share(samples: list[float], share: float) -> None:
    found = percentile(samples, share)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= share * len(samples)
    assert sum(sample < found for sample in samples) < share * len(samples)


def test_a_figure_knows_its_worst_sample_and_its_ratio() -> None:
    times = figure(Quantity("cold", "a start", "s", [1.0, 2.0, 9.0], "the other", [4.0]))
    assert (times.n, times.median, times.worst, times.ratio) == (3, 2.0, 9.0, 0.5)
    rate = figure(Quantity("rate", "starts", "/s", [1.0, 2.0, 9.0], more_is_better=True))
    assert (rate.worst, rate.ratio) == (1.0, None)
    lines = figures_table([asdict(times), asdict(rate)]).splitlines()
    assert lines[2:] == ["| a start | 2 s | 9 s | 3 | 0.50 × the other |", "| starts | 2 /s | 1 /s | 3 |  |"]


def test_a_figure_is_held_against_its_bar() -> None:
    figures = [
        figure(Quantity("rate", "text", "MB/s", samples, "stock", [20.0], more_is_better=True, least=40.0))
        for samples in ([39.0, 40.0, 41.0], [39.9])
    ]
    assert [one.held for one in figures] == [True, False]
    lines = figures_table([asdict(one) for one in figures]).splitlines()
    assert lines[2].endswith("| 3 | 2.00 × stock (≥ 40 MB/s) |")
    assert lines[3].endswith("| 1 | 2.00 × stock (≥ 40 MB/s, missed) |")
    assert report.Measured(VERSIONS, [], [], figures, {}).missed == ["text: 39.9 MB/s, at least 40"]


# --- levels -----------------------------------------------------------------------------------------------------------


def test_a_cell_of_each_client_takes_as_long_as_the_cores_need() -> None:
    assert [unit(clients, 4.0, 2) for clients in (1, 2, 10, 50)] == [4.0, 4.0, 20.0, 100.0]


def test_fifty_clients_are_held_against_their_bar() -> None:
    def level(worst: float, failures: dict[str, int]) -> Level:
        return Level("live", 50, 2.0, [100.0] * 60 + [worst] * 40, Counter(failures))

    held = [summary(one, 4.0, 2).held for one in (level(300.0, {}), level(301.0, {}), level(300.0, {"timeout": 1}))]
    assert held == [True, False, False]
    assert summary(level(300.0, {}), 4.0, 2).throughput == 50.0
    assert summary(level(300.0, {})).held is None  # without a bare round trip there is nothing to hold it against
    assert summary(Level("live", 50, 2.0), 4.0, 2).held is False


def test_the_table_of_levels_counts_errors_by_kind() -> None:
    rows = [
        summary(Level("burst", 2, 1.0, [10.0, 2000.0], sources=Counter(warm=1, started=1))),
        summary(Level("fresh", 5, 1.0, [], Counter({"HTTP 503": 3, "timeout": 1}))),
        summary(Level("live", 50, 1.0, [700.0]), 4.0, 2),
    ]
    lines = load_table([asdict(row) for row in rows]).splitlines()[2:]
    plain = load_table([asdict(row) for row in rows[:2]])
    assert "÷" not in plain and "3 × HTTP 503" in plain
    assert lines == [
        "| live sessions | 50 | 1 | none | 1 | 700.0 ms | 700.0 ms | 700.0 ms | 7.00 (≤ 3, missed) |",
        "| burst of new sessions (1 of them warm) | 2 | 2 | none | 2 | 10.0 ms | 2.00 s | 2.00 s |  |",
        "| fresh sandboxes | 5 | 0 | 3 × HTTP 503, 1 × timeout | 0 | – | – | – |  |",
    ]


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_run_is_told_with_all_that_it_missed() -> None:
    measured = report.Measured(
        VERSIONS,
        [report.result("live", [1.2] * 10, [1.0] * 10), report.result("claim", [0.5] * 9 + [9.0], [1.0] * 10)],
        [summary(Level("live", 50, 1.0, [700.0]), 4.0, 2)],
        [figure(Quantity("rate", "starts per second", "/s", [0.5]))],
        {"live": [1.2] * 10},
    )
    text = report.table(json.loads(json.dumps(measured.document)))
    for part in ("| 1.20 | ≤ 1.3 |", "(p99 9.00) | ≤ 0.6 (p99 ≤ 4), missed |", "7.00 (≤ 3, missed)", "| 0.5 /s |"):
        assert part in text
    assert [line.partition(":")[0] for line in measured.missed] == ["claim", "50 clients on live sessions"]


def test_raw_samples_are_json() -> None:
    assert json.loads(report.samples_text({"a": [1.00001, 2.0], "b": []})) == {"a": [1.0, 2.0], "b": []}


# --- the client and the loops, against a server that answers by rule --------------------------------------------------


class _Server(http.server.BaseHTTPRequestHandler):
    """Runs `print(number)`, knows one variable per session, and fails as its path says."""

    protocol_version = "HTTP/1.1"
    markers: dict[str, str]
    deleted: list[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        failure = self.path.removesuffix("/exec").strip("/")
        if failure.isdigit():
            return self._answer(int(failure), {"error": "no"}, {"Retry-After": "0"})
        code, session = body["code"], body.get("session_id") or f"s{len(self.markers)}"
        if code.startswith("marker = "):
            self.markers[session] = code.partition("\n")[0].removeprefix("marker = ")
        printed = code.rpartition("print(")[2].rstrip(")")
        values = {"marker": self.markers.setdefault(session, ""), "6 * 7": "42"}
        stdout = "" if failure == "wrong" else values.get(printed, printed) + "\n"
        if failure == "forgets" and printed == "marker" and not code.startswith("marker"):
            stdout = ""
        self._answer(200, {"session_id": session, "stdout": stdout, "stderr": "", "source": "warm"}, {})

    def do_DELETE(self) -> None:
        self.deleted.append(self.path.rpartition("/")[2])
        self._answer(204, None, {})

    def _answer(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Server]]]:
    """The URL of such a server, and its state."""
    handler = type("Handler", (_Server,), {"markers": {}, "deleted": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        http_server.daemon_threads = False
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http_server.server_port}", handler
        finally:
            http_server.shutdown()
            thread.join()


def test_a_burst_opens_sessions_that_then_are_live_ones(server: tuple[str, type[_Server]]) -> None:
    url, state = server
    new_client = partial(ExecClient, url, "a-key")
    sessions = [LiveSession(number) for number in range(4)]
    opened = closed_loop.burst(new_client, sessions)
    assert (len(opened.samples), opened.failures, opened.sources) == (4, Counter(), Counter(warm=4))
    level = closed_loop.live(new_client, sessions[:2], 0.05)
    assert level.samples and not level.failures and level.seconds >= 0.05
    closed_loop.end_sessions(new_client, sessions)
    assert len(state.deleted) == 4


def test_a_server_that_keeps_no_variables_has_no_live_sessions(server: tuple[str, type[_Server]]) -> None:
    new_client = partial(ExecClient, f"{server[0]}/forgets", "a-key")
    sessions = [LiveSession(1)]
    closed_loop.open_missing(new_client, sessions)
    assert closed_loop.live(new_client, sessions, 0.02).failures == Counter({"variables lost (wrong answer)": 1})


def test_fresh_calls_end_their_sessions_and_are_as_many_as_asked_for(server: tuple[str, type[_Server]]) -> None:
    url, state = server
    level = closed_loop.fresh(partial(ExecClient, url, "a-key"), clients=3, calls=7)
    assert (len(level.samples), len(state.deleted)) == (7, 7)


@pytest.mark.parametrize(("path", "kind"), [("503", "HTTP 503"), ("429", "HTTP 429"), ("wrong", "wrong answer")])
def test_what_fails_is_counted_by_kind(server: tuple[str, type[_Server]], path: str, kind: str) -> None:
    level = closed_loop.fresh(partial(ExecClient, f"{server[0]}/{path}", "a-key"), clients=2, calls=4)
    assert (level.samples, level.failures) == ([], Counter({kind: 4}))


def test_a_server_that_cannot_be_measured_is_told_why(server: tuple[str, type[_Server]]) -> None:
    def reason(url: str) -> str | None:
        client = ExecClient(url, "a-key", timeout=5)
        try:
            return check(client)
        finally:
            client.close()

    assert reason(server[0]) is None
    assert "the key is not valid" in str(reason(f"{server[0]}/401"))
    assert "base path" in str(reason(f"{server[0]}/404"))
    assert "connection" in str(reason("http://127.0.0.1:1"))
    with pytest.raises(ValueError, match="not the URL"):
        ExecClient("localhost:8000", "a-key")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0.0), ("2", 2.0), ("0.5", 0.5), ("600", 30.0), ("-1", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)],
)
def test_a_server_is_waited_for_as_it_asks(header: str | None, seconds: float) -> None:
    assert pause_of(header) == seconds
