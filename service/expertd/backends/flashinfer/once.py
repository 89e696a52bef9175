"""Warnings that hold for a process: told once, not for each layer and each trial of a proof."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(log: logging.Logger, text: str) -> None:
    log.warning("%s", text)
