"""On which devices a process serves at all."""

from __future__ import annotations

import threading

import pytest
from tests.door.test_limits import parsed

from expertd import app
from expertd.capability.device import DeviceInfo
from expertd.errors import InvalidArgument


@pytest.mark.parametrize("arch", ["sm107", "sm75"])
def test_a_card_that_triton_cannot_compile_for_is_refused(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiler would end the process at the first layer."""
    monkeypatch.setattr(app, "detect", lambda name: DeviceInfo("cuda", arch, "a card", 0))
    settings = parsed("--identity", "echo=8", "--device", "cuda:0")
    with pytest.raises(InvalidArgument, match=f"a card is {arch}.* sm90, .*--device cpu"):
        app.App(settings, threading.Event())
