"""Settings as --print-config shows them: a TOML file that --config reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from expertd.config import SETTINGS, Named, Resolved


def as_toml(resolved: Resolved) -> Iterator[str]:
    """A line for each setting and where it came from; one without a value is a comment."""
    for setting in SETTINGS:
        value = getattr(resolved.settings, setting.name)
        shown = [_plain(one) for one in value] if setting.repeated else _plain(value)
        line = f"{setting.name} = {json.dumps(shown, ensure_ascii=False)}"
        told = f"# {setting.name} is not set" if value is None else line
        yield f"{told}  # {resolved.origins[setting.name]}"


def _plain(value: Any) -> Any:
    """A setting's value as a flag would give it."""
    if isinstance(value, Named):
        return f"{value.name}={value.value}"
    if not isinstance(value, tuple):
        return value
    ranges = value if isinstance(value[0], tuple) else (value,)
    return ",".join(f"{first}-{last}" for first, last in ranges)
