"""Versions in order: 0.6.18rc7 < 0.6.18 < 0.6.18.post1 < 0.7.0."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from expertd.errors import InvalidArgument

_FORM = re.compile(
    r"(?P<release>\d{1,6}(?:\.\d{1,6}){0,5})(?:(?P<phase>a|b|rc)(?P<pre>\d{1,6}))?"
    r"(?:\.post(?P<post>\d{1,6}))?(?P<dev>\.dev\d{1,12})?(?:\+[\w.]{1,80})?"
)


class Version(NamedTuple):
    """Compares as the versions of one package do; development builds come before their release."""

    release: tuple[int, ...]
    stage: tuple[int, str, int, int]


@cache
def parse(text: str) -> Version:
    """The version that text names; raises InvalidArgument when it names none."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"flashinfer version {text[:60]!r} is not like 0.7.2 or 0.7.2.post1")
    release = tuple(int(part) for part in found["release"].split("."))
    while release and release[-1] == 0:
        release = release[:-1]
    final = 0 if found["dev"] or found["phase"] else 1
    return Version(release, (final, found["phase"] or "", int(found["pre"] or 0), _post(found)))


def _post(found: re.Match[str]) -> int:
    return int(found["post"] or 0)


def at_least(version: str, since: str | None) -> bool:
    """Whether version is since or later; None bounds nothing."""
    return since is None or parse(version) >= parse(since)
