"""JSON files of this user's cache: replaced whole, and empty when they cannot be read."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read_entries(path: Path, name: str) -> list[dict[str, Any]]:
    """The list of objects under name; none if the file is not there or not ours."""
    try:
        entries = json.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def replace_entries(path: Path, name: str, entries: list[dict[str, Any]]) -> None:
    """Writes the list beside the file, then puts it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({name: entries}, file, indent=1)
    os.replace(file.name, path)
