"""Figures: measured quantities that are no round trips (rates, CPU, memory, seconds), and their table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """Raw samples of one quantity, and what they are set against where that makes sense."""

    case: str
    what: str
    unit: str
    samples: Sequence[float]
    #: what the baseline is, in words; `baseline` are its samples
    against: str = ""
    baseline: Sequence[float] = ()
    more_is_better: bool = False
    #: what the median has to be at least
    least: float | None = None


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    case: str
    what: str
    unit: str
    n: int
    median: float
    worst: float
    against: str
    baseline_median: float | None
    ratio: float | None
    least: float | None = None

    @property
    def held(self) -> bool:
        """Whether its bar was held, where there is one."""
        return self.least is None or self.median >= self.least


def figure(quantity: Quantity) -> Figure:
    """Sum up one quantity. Raises statistics.StatisticsError where it has no samples."""
    median = statistics.median(quantity.samples)
    worst = min(quantity.samples) if quantity.more_is_better else max(quantity.samples)
    base = statistics.median(quantity.baseline) if quantity.baseline else None
    return Figure(
        case=quantity.case,
        what=quantity.what,
        unit=quantity.unit,
        n=len(quantity.samples),
        median=round(median, 4),
        worst=round(worst, 4),
        against=quantity.against,
        baseline_median=None if base is None else round(base, 4),
        ratio=None if not base else round(median / base, 3),
        least=quantity.least,
    )


def figures_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| what | median | worst | of | ratio |", "|---|---:|---:|---:|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} × {row['against']}"
        if (least := row.get("least")) is not None:
            bar = f"≥ {least:g} {row['unit']}" + (", missed" if row["median"] < least else "")
            ratio = f"{ratio} ({bar})" if ratio else bar
        lines.append(
            f"| {row['what']} | {row['median']:.3g} {row['unit']} | {row['worst']:.3g} {row['unit']} "
            f"| {row['n']} | {ratio} |"
        )
    return "\n".join(lines)
