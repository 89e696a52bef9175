"""JSON files of this user's cache: replaced whole, and empty when they cannot be read.

They only save work: where they cannot be written it is done again at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

log = logging.getLogger(__name__)

DRAFT = ".draft"
STALE_SECONDS = 3600


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
    """Writes the list beside the file, then puts it in its place; a warning where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        with TemporaryDirectory(DRAFT, path.name, path.parent) as directory:
            draft = Path(directory, path.name)
            draft.write_text(json.dumps({name: entries}, indent=1))
            os.replace(draft, path)
    except OSError as error:
        log.warning("%s is not kept: %s; XDG_CACHE_HOME names another place", path, error)


def _remove_stale(path: Path) -> None:
    """The drafts of processes that were killed as they wrote."""
    for draft in path.parent.glob(f"{path.name}*{DRAFT}"):
        with suppress(FileNotFoundError):  # another process may be at it as well
            if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(draft)
