"""ApiKeys: the trait of further API keys, by owner."""

from __future__ import annotations

import ast
from typing import Any

from traitlets import Dict, TraitError

from gateway.auth import known_digest


class ApiKeys(Dict):
    """Owner's id → API key. As a text also plain keys, separated by commas: each gets an owner named after its hash."""

    def from_string(self, s: str) -> Any:
        if not s.lstrip().startswith("{"):
            return {_owner_of(key): key for key in map(str.strip, s.split(",")) if key}
        try:
            return ast.literal_eval(s.strip())
        except (ValueError, SyntaxError):
            # Without the text: it is all keys.
            raise TraitError('it starts like a dictionary, but is none such as {"ada": "KEY"}') from None


def _owner_of(key: str) -> str:
    try:
        return f"key-{known_digest(key).hex()[:8]}"
    except ValueError:
        # No digest follows `sha256:`; the check of all keys says so.
        return "key-unknown"
