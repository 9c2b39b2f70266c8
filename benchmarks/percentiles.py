"""Percentiles: which sample speaks for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all samples do not exceed. Raises IndexError where there is none."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]
