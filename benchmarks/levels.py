"""Levels: what a closed loop at one number of clients gave, summed up, and their table. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.percentiles import percentile

#: What the p99 of live sessions may be at most, in the time that the cores need for all clients' cells.
LIVE_BAR = 3.0
LIVE_BAR_CLIENTS = 50

#: in the order of the table
KINDS = {"live": "live sessions", "burst": "burst of new sessions", "fresh": "fresh sandboxes"}


@dataclass
class Level:
    """Raw results of one level; times in milliseconds, of right answers only."""

    kind: str
    clients: int
    #: from the common start to the last answer
    seconds: float = 0.0
    samples: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    #: where the sandboxes came from, where the server says so
    sources: Counter[str] = field(default_factory=Counter)
    #: CPU that making the load took, from the same cores where the server is on this machine
    generator_cpu_s: float = 0.0

    @property
    def name(self) -> str:
        """What its raw samples are stored under."""
        return f"load: {self.kind}, {self.clients} clients"


@dataclass(frozen=True)
class LevelSummary:
    """One line of the table. `unit_ms` is what a perfect server needs for a cell of each client; ratios are to it."""

    kind: str
    clients: int
    n: int
    errors: dict[str, int]
    sources: dict[str, int]
    seconds: float
    throughput: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    generator_cpu_s: float
    unit_ms: float | None = None
    ratio_p99: float | None = None
    bar_p99: float | None = None
    held: bool | None = None


def unit(clients: int, bare_ms: float, cores: int) -> float:
    """Milliseconds in which `cores` run one cell for each client, when each cell takes `bare_ms` of one core."""
    return bare_ms * max(1.0, clients / cores)


def summary(level: Level, bare_ms: float | None = None, cores: int = 1) -> LevelSummary:
    """Sum up a level; with a bare round trip of the same run, live sessions are held against their bar."""
    p50, p95, p99 = (
        round(percentile(level.samples, share), 3) if level.samples else None for share in (0.5, 0.95, 0.99)
    )
    unit_ms = ratio = bar = None
    held = None
    if bare_ms is not None and level.kind == "live":
        unit_ms = round(unit(level.clients, bare_ms, cores), 3)
        ratio = None if p99 is None else round(p99 / unit_ms, 3)
        if level.clients == LIVE_BAR_CLIENTS:
            bar = LIVE_BAR
            held = ratio is not None and ratio <= bar and not level.failures
    return LevelSummary(
        kind=level.kind,
        clients=level.clients,
        n=len(level.samples),
        errors=dict(level.failures),
        sources=dict(level.sources),
        seconds=round(level.seconds, 3),
        throughput=round(len(level.samples) / level.seconds, 3) if level.seconds else 0.0,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        generator_cpu_s=round(level.generator_cpu_s, 3),
        unit_ms=unit_ms,
        ratio_p99=ratio,
        bar_p99=bar,
        held=held,
    )


def load_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The levels as a Markdown table; ratios where there was a bare round trip to compare with."""
    heads = ["what", "clients", "answers", "errors", "per second", "p50", "p95", "p99"]
    compared = any(row["ratio_p99"] is not None for row in rows)
    if compared:
        heads.append("p99 ÷ (clients × bare ÷ cores)")
    lines = [_line(heads), _line(["---" if head in ("what", "errors") else "---:" for head in heads])]
    kinds = list(KINDS)
    for row in sorted(rows, key=lambda row: (kinds.index(row["kind"]), row["clients"])):
        times = [_milliseconds(row[name]) for name in ("p50_ms", "p95_ms", "p99_ms")]
        errors = _counts(row["errors"]) or "none"
        cells = [_what(row), str(row["clients"]), str(row["n"]), errors, f"{row['throughput']:.3g}", *times]
        lines.append(_line([*cells, _ratio(row)] if compared else cells))
    return "\n".join(lines)


def errors_of(levels: Sequence[Level]) -> int:
    """How many calls of all levels failed."""
    return sum(level.failures.total() for level in levels)


def _what(row: Mapping[str, Any]) -> str:
    known = row["sources"] and row["kind"] != "live"
    return KINDS[row["kind"]] + (f" ({row['sources'].get('warm', 0)} of them warm)" if known else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(row: Mapping[str, Any]) -> str:
    if row["ratio_p99"] is None:
        return ""
    bar = "" if row["bar_p99"] is None else f" (≤ {row['bar_p99']:g}{', missed' if row['held'] is False else ''})"
    return f"{row['ratio_p99']:.2f}{bar}"


def _counts(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(errors.items()))


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.2f} s"
