"""FlashInfer's names in one object, and its log in ours."""

from __future__ import annotations

import json
import logging

import pytest
from tests.service.trtllm import flashinfer_cpu

from expertd.backends.flashinfer.library import adopt, library
from expertd.logs import JsonFormatter

assert flashinfer_cpu  # FlashInfer is imported with a workspace of its own


def test_flashinfers_lines_are_ours(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from flashinfer.jit import core

    assert callable(library().autotune)
    with caplog.at_level(logging.INFO):
        core.logger.warning("tuned %d", 3)
    assert capfd.readouterr().err == "", "its own handler is gone"
    (record,) = caplog.records
    assert json.loads(JsonFormatter().format(record))["message"] == "tuned 3"


def test_only_what_writes_to_the_terminal_goes(tmp_path: object) -> None:
    logger = logging.Logger("another")
    kept = logging.FileHandler(f"{tmp_path}/log")
    logger.addHandler(logging.StreamHandler())
    logger.addHandler(kept)
    adopt(logger)
    assert logger.handlers == [kept] and logger.parent is logging.getLogger()
    kept.close()


def test_a_name_that_it_lacks() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = library().no_such_thing
