"""Settings from files: what --print-config writes is read back, and wrong types are told."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from expertd.cli.settings_file import as_toml
from expertd.config import SETTINGS, Resolved, add_flags, resolve
from expertd.errors import InvalidArgument

FLAGS = {
    "nothing": (),
    "everything that is not plain": (
        *("--model", "a=/x=y", "--model", 'q="/o\\ö', "--identity", "e=8", "--layers", "3-10,12"),
        *("--experts", "0-63", "--demo", "--drain-seconds", "1.5", "--layout-cache-bytes", "0"),
        *("--tokens", "some file # 1", "--allow-host", "one", "--allow-host", "two"),
    ),
}


def of(*flags: str) -> Resolved:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return resolve(parser.parse_args(flags), {})


@pytest.mark.parametrize("case", FLAGS)
def test_a_printed_config_is_read_back(case: str, tmp_path: Path) -> None:
    first = of(*FLAGS[case])
    path = tmp_path / "settings.toml"
    path.write_text("\n".join(as_toml(first)))
    again = of("--config", str(path))
    assert again.settings == first.settings
    unset = {s.name for s in SETTINGS if getattr(first.settings, s.name) is None}
    assert tomllib.loads(path.read_text()).keys() == {s.name for s in SETTINGS} - unset
    for name in unset:
        assert f"# {name} is not set  # default\n" in path.read_text()


def test_a_printed_config_tells_where_each_value_came_from(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('identity = ["e=8"]\nhttp_port = 7000')
    told = list(as_toml(of("--config", str(path), "--http-port", "9000")))
    assert "http_port = 9000  # flag --http-port" in told
    assert f'identity = ["e=8"]  # identity in {path}' in told


WRONG = {
    'http_port = "abc"': "'abc' given; 0 to 65535 is accepted",
    "http_port = 1.5": "'1.5' given; 0 to 65535 is accepted",
    "http_port = [1, 2]": "one value is accepted",
    "host = false": "'False' given; a text in quotes is accepted",
    "device = 3": "'3' given; a text in quotes is accepted",
    "tokens = 5": "'5' given; a text in quotes is accepted",
    "allow_host = [1]": "'1' given; a text in quotes is accepted",
    "demo = 1": "'1' given; true or false is accepted",
    'demo = "maybe"': "'maybe' given; true or false is accepted",
    "model = 7": "'7' given; NAME=VALUE is accepted",
    'model = {a = "b"}': "NAME=VALUE is accepted",
    "identity = [[]]": "NAME=VALUE is accepted",
    "drain_seconds = true": "'True' given; 0 to 3600 is accepted",
    "drain_seconds = nan": "0 to 3600 is accepted",
    "max_batch_tokens = 1e3": "1 to 16777216 is accepted",
    "max_batch_tokens = 2024-01-01": "1 to 16777216 is accepted",
    "batch_delay_us = -1": "0 to 1000000 is accepted",
    "backend = []": "one value is accepted",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_value_of_a_wrong_type_names_the_setting_and_what_is_accepted(
    text: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    name = text.partition(" ")[0]
    with pytest.raises(InvalidArgument) as refused:
        of("--config", str(path))
    assert str(refused.value).startswith(f"{name} in {path}: ") and WRONG[text] in str(
        refused.value
    )


def test_texts_and_numbers_that_are_meant_are_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('demo = true\nhttp_port = "81"\nlayers = 5\nidentity = "e=8"\nthreads = 0')
    settings = of("--config", str(path)).settings
    assert (settings.demo, settings.http_port, settings.layers) == (True, 81, ((5, 5),))
    assert settings.identity == (("e", "8"),)
