"""A load tells how far it is: once a second as JSON, or as a bar on a terminal."""

from __future__ import annotations

import io
import json

from expertd.weights.progress import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_a_second_and_one_at_the_end() -> None:
    now, out = [0.0], io.StringIO()
    with Meter("m/3", 100, out, lambda: now[0]) as meter:
        for now[0], nbytes in ((0.5, 10), (1.0, 20), (1.5, 30), (2.1, 25)):
            meter(nbytes)
        now[0] = 2.2
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["seconds"], line["bytes"]) for line in lines] == [(1.0, 30), (2.1, 85), (2.2, 85)]
    assert all(line["loading"] == "m/3" and line["total"] == 100 for line in lines)


def test_a_terminal_gets_a_bar_and_no_json() -> None:
    out = Terminal()
    with Meter("m/3", 1 << 20, out) as meter:
        meter(1 << 19)
    assert "m/3" in out.getvalue() and "{" not in out.getvalue()
