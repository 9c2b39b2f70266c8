"""Traits that traitlets lacks."""

from __future__ import annotations

import math
from typing import Any

from traitlets import Float


class FiniteFloat(Float[Any, Any]):
    """A number. NaN would pass each comparison with a bound, and no clock can wait for infinity."""

    info_text = "a finite number"

    def validate(self, obj: Any, value: Any) -> Any:
        value = super().validate(obj, value)
        if value is not None and not math.isfinite(value):
            self.error(obj, value)
        return value
