"""Samples → results.json and the README's table. Pure but for the two writers at the end."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, figures_table
from benchmarks.levels import LevelSummary, load_table
from benchmarks.percentiles import percentile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
SAMPLES = ROOT / "benchmarks" / "samples.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: written by `make bench` -->", "<!-- end of numbers -->"


@dataclass(frozen=True)
class Bar:
    """What a case may cost at most, in bare round trips' p50."""

    p50: float
    p99: float | None = None


#: case → (what it is, in the README's words; its bar)
CASES: dict[str, tuple[str, Bar | None]] = {
    "bare": ("bare round trip, stock ipykernel", None),
    "sandbox": ("bare round trip, a sandbox's kernel", None),
    "live": ("`POST /exec` in a live session", Bar(1.3)),
    "gateway": ("the gateway's own part of that", Bar(0.35)),
    "claim": ("claim of a warm sandbox, while the pool refills", Bar(0.6, 4.0)),
    "first": ("new session to first result, from a full pool", Bar(2.5)),
    "first_refilling": ("the same, while the pool refills", None),
    "live_quiet": ("`POST /exec` in a live session, beside a pool of ten at rest", None),
    "live_refilling": ("the same, while that pool refills", None),
    "websocket": ("a cell over a websocket", None),
    "websocket_own": ("the gateway's own part of that", Bar(0.2)),
    "websocket_quick": ("the same cell, the client acknowledges at once (TCP_QUICKACK)", None),
    "websocket_quick_own": ("the gateway's own part of that", None),
    "stock_websocket": ("a cell over a websocket of stock jupyter_server", None),
    "stock_websocket_own": ("jupyter_server's own part of that", None),
    "stock_websocket_quick": ("the same cell, the client acknowledges at once", None),
    "stock_websocket_quick_own": ("jupyter_server's own part of that", None),
}


@dataclass(frozen=True)
class Result:
    """One line of results.json; times in milliseconds. The baseline was measured interleaved with the case."""

    case: str
    n: int
    p50_ms: float
    p99_ms: float
    baseline_p50_ms: float
    ratio_p50: float
    ratio_p99: float
    bar_p50: float | None
    bar_p99: float | None
    held: bool | None


def result(case: str, samples: Sequence[float], baseline: Sequence[float]) -> Result:
    """Sum up one case; the ratios are to the baseline's p50."""
    base = statistics.median(baseline)
    p50, p99 = statistics.median(samples), percentile(samples, 0.99)
    bar = CASES[case][1]
    held = None
    if bar is not None:
        held = p50 <= bar.p50 * base and (bar.p99 is None or p99 <= bar.p99 * base)
    return Result(
        case=case,
        n=len(samples),
        p50_ms=round(p50, 3),
        p99_ms=round(p99, 3),
        baseline_p50_ms=round(base, 3),
        ratio_p50=round(p50 / base, 3),
        ratio_p99=round(p99 / base, 3),
        bar_p50=bar.p50 if bar else None,
        bar_p99=bar.p99 if bar else None,
        held=held,
    )


def table(document: Mapping[str, Any]) -> str:
    """The README's tables, as Markdown: those of what was measured, and what it depends on."""
    parts = [
        write_rows(document[name])
        for name, write_rows in (("results", latency_table), ("load", load_table), ("figures", figures_table))
        if document.get(name)
    ]
    versions = document["versions"]
    load = f", load average {versions['load_before']:g} before" if "load_before" in versions else ""
    parts.append(
        f"{versions['cpus']} cores{load}, Docker {versions['engine']}, Python {versions['python']}, "
        f"ipykernel {versions['ipykernel']}, pyzmq {versions['pyzmq']}. An absolute time says little on another "
        "machine; the ratio to a bare round trip, measured interleaved in the same run, does. "
        "The cell is `print(1)`; raw samples are in `benchmarks/samples.json`."
    )
    return "\n\n".join(parts)


def latency_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The latencies as a Markdown table."""
    lines = [
        "| what | p50 | p99 | p50 ÷ bare round trip | bar |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        bar = "" if row["bar_p50"] is None else f"≤ {row['bar_p50']:g}"
        if row["bar_p99"] is not None:
            bar += f" (p99 ≤ {row['bar_p99']:g})"
        if row["held"] is False:
            bar += ", missed"
        what = CASES[row["case"]][0]
        ratio = f"{row['ratio_p50']:.2f}"
        if row["bar_p99"] is not None:
            ratio += f" (p99 {row['ratio_p99']:.2f})"
        lines.append(f"| {what} | {row['p50_ms']:.2f} ms | {row['p99_ms']:.2f} ms | {ratio} | {bar} |")
    return "\n".join(lines)


def readme_with(text: str, document: Mapping[str, Any]) -> str:
    """The README's text with the table in its place. Raises ValueError where the place is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(document)}\n{END}{after}"


@dataclass(frozen=True)
class Measured:
    """Everything that one run found. `samples` are the raw ones, in milliseconds or in the unit of their figure."""

    versions: Mapping[str, Any]
    results: Sequence[Result]
    load: Sequence[LevelSummary]
    figures: Sequence[Figure]
    samples: Mapping[str, Sequence[float]]

    @property
    def document(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "versions": dict(self.versions),
            "results": [asdict(row) for row in self.results],
            "load": [asdict(row) for row in self.load],
            "figures": [asdict(row) for row in self.figures],
        }

    @property
    def missed(self) -> list[str]:
        """A line for each bar that was missed."""
        return [
            *(
                f"{row.case}: p50 {row.ratio_p50:g} × (p99 {row.ratio_p99:g} ×)"
                for row in self.results
                if row.held is False
            ),
            *(
                f"{row.clients} clients on live sessions: p99 {row.ratio_p99} ×, errors {row.errors}"
                for row in self.load
                if row.held is False
            ),
            *(
                f"{row.what}: {row.median:.3g} {row.unit}, at least {row.least:g}"
                for row in self.figures
                if not row.held
            ),
        ]


def samples_text(samples: Mapping[str, Sequence[float]]) -> str:
    """Raw samples as JSON, one case a line."""
    rounded = {case: [round(value, 4) for value in values] for case, values in samples.items()}
    lines = ",\n".join(f" {json.dumps(case)}: {json.dumps(values)}" for case, values in rounded.items())
    return f"{{\n{lines}\n}}\n"


def write(measured: Measured) -> None:
    """Write results.json, the raw samples beside it, and the README's tables."""
    RESULTS.write_text(json.dumps(measured.document, indent=1) + "\n", encoding="utf-8")
    SAMPLES.write_text(samples_text(measured.samples), encoding="utf-8")
    README.write_text(readme_with(README.read_text(encoding="utf-8"), measured.document), encoding="utf-8")
