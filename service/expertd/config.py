"""Settings: flags > EXPERTD_* > TOML > defaults, resolved once; nothing else reads the environment.

Each setting is one row of SETTINGS: its flag, its variable and its TOML key follow from its name.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from expertd.errors import InvalidArgument
from expertd_wire.methods import DEFAULT_MAX_MESSAGE_BYTES, MESSAGE_SLACK_BYTES

Ranges = tuple[tuple[int, int], ...]

MOST_NUMBER = (1 << 16) - 1
"""No model has so many layers, or experts in one; each number that is named takes memory."""
_DIGITS = 10

MOST_MESSAGE_BYTES = (1 << 31) - 1 - MESSAGE_SLACK_BYTES
"""gRPC counts in 32 bits, and is told a little more than this."""


class Named(NamedTuple):
    """A NAME=VALUE setting."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: parse takes one text; a repeated setting is a tuple of what parse makes."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    metavar: str = ""
    repeated: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "EXPERTD_" + self.name.upper()


def parse_named(text: str) -> Named:
    name, separator, value = text.partition("=")
    if not (separator and name and value):
        raise ValueError("NAME=VALUE is accepted")
    return Named(name, value)


def parse_identity(text: str) -> Named:
    named = parse_named(text)
    if not named.value.isdecimal() or not 1 <= int(named.value) <= 1 << 20:
        raise ValueError("NAME=HIDDEN is accepted, HIDDEN a whole number from 1 to 1048576")
    return named


def parse_ranges(text: str) -> Ranges:
    """Inclusive ranges such as 3-10,12."""
    return tuple(parse_range(part) for part in text.split(","))


def parse_range(text: str) -> tuple[int, int]:
    """An inclusive range such as 0-63, or one number."""
    first, separator, last = text.strip().partition("-")
    last = last if separator else first
    numbers = [int(text) for text in (first, last) if text.isdecimal() and len(text) < _DIGITS]
    if len(numbers) < 2 or not numbers[0] <= numbers[1] <= MOST_NUMBER:
        raise ValueError(
            f"a number or an inclusive range such as 3-10 is accepted, up to {MOST_NUMBER}"
        )
    return numbers[0], numbers[1]


def parse_flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError("true or false is accepted")
    return values[text.lower()]


def number(least: float, most: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """A parser of numbers within bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = nan
        if not least <= value <= most:
            raise ValueError(f"{least} to {most} is accepted")
        return value

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """A parser of one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"accepted: {', '.join(names)}")
        return text

    return parse


SETTINGS: tuple[Setting, ...] = (
    Setting("model", parse_named, (), "serve the checkpoint in PATH as NAME", "NAME=PATH", True),
    Setting("demo", parse_flag, False, "serve a small made-up checkpoint as model demo"),
    Setting(
        "identity", parse_identity, (), "serve a layer that copies its rows", "NAME=HIDDEN", True
    ),
    Setting("layers", parse_ranges, None, "load only these layers of each model", "3-10,12"),
    Setting("experts", parse_range, None, "load only these experts of each layer", "0-63"),
    Setting("device", str, "auto", "where the experts run", "auto|cpu|cuda:N"),
    Setting("simulate", one_of("sm100"), None, "a stand-in for a card, for demos", "sm100"),
    Setting("testing", parse_flag, False, "allow what only tests need"),
    Setting("backend", str, "auto", "run every call on this backend", "auto|NAME"),
    Setting("trust", one_of("proven", "declared"), "proven", "plans to use", "proven|declared"),
    Setting("tune", one_of("auto", "off"), "auto", "measure a layer's plans", "auto|off"),
    Setting("cuda_graphs", one_of("auto", "off"), "auto", "of small batches", "auto|off"),
    Setting("exact_routing", parse_flag, False, "never let a kernel route by itself"),
    Setting(
        "deterministic", parse_flag, False, "refuse kernels that may give other bits each time"
    ),
    Setting("host", str, "127.0.0.1", "the address to listen on", "ADDRESS"),
    Setting("http_port", number(0, 65535), 8000, "HTTP port, 0 chooses one", "PORT"),
    Setting("grpc_port", number(0, 65535), 8001, "gRPC port, 0 chooses one", "PORT"),
    Setting("announce", one_of("text", "json"), "text", "what to print when ready", "text|json"),
    Setting("tokens", str, None, "a file of bearer tokens: lines 'scope[,scope] token'", "FILE"),
    Setting("tls_cert", str, None, "the server's certificate chain, PEM", "FILE"),
    Setting("tls_key", str, None, "the certificate's key, PEM", "FILE"),
    Setting("tls_client_ca", str, None, "clients need a certificate of this CA", "FILE"),
    Setting("allow_host", str, (), "a Host that HTTP callers may name", "NAME", True),
    Setting("model_root", str, None, "every model's path must lie under this", "DIR"),
    Setting("log", one_of("text", "json"), "text", "how to log", "text|json"),
    Setting("drain_seconds", number(0, 3600, float), 30.0, "how long a drain may take", "SECONDS"),
    Setting(
        "max_message_bytes",
        number(1 << 10, MOST_MESSAGE_BYTES),
        DEFAULT_MAX_MESSAGE_BYTES,
        "largest request",
        "BYTES",
    ),
    Setting("max_call_tokens", number(1, 1 << 24), 65536, "most rows of one call", "ROWS"),
    Setting("max_batch_tokens", number(1, 1 << 24), 8192, "most rows of one launch", "ROWS"),
    Setting(
        "batch_delay_us",
        number(0, 1_000_000),
        0,
        "let a batch form so long at most",
        "MICROSECONDS",
    ),
    Setting("batch_invariant", parse_flag, False, "never merge calls: results never depend on it"),
    Setting("expert_rows", parse_flag, False, "show each expert's rows in /metrics"),
    Setting("max_queued_tokens", number(1, 1 << 30), 65536, "most rows that wait", "ROWS"),
    Setting("max_queued_bytes", number(1 << 10, 1 << 40), 1 << 30, "most bytes that wait", "BYTES"),
    Setting("max_concurrent_calls", number(1, 4096), 64, "most calls at once", "CALLS"),
    Setting("max_stream_calls", number(1, 4096), 64, "most unanswered calls of a stream", "CALLS"),
    Setting("max_header_bytes", number(1024, 1 << 20), 16384, "most headers of a call", "BYTES"),
    Setting("header_seconds", number(1, 600, float), 10.0, "time to send HTTP headers", "SECONDS"),
    Setting(
        "ingress_bytes", number(1 << 20, 1 << 44), 16 << 30, "most bytes of all calls", "BYTES"
    ),
    Setting(
        "layout_cache_bytes",
        number(0, 1 << 44),
        None,
        "most bytes of weights in layouts beside the canonical one (default: what is spare)",
        "BYTES",
    ),
    Setting("threads", number(0, 1024), 0, "CPU threads that compute, 0: cores - 1", "THREADS"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting's value; fields are the names in SETTINGS."""

    model: tuple[Named, ...]
    demo: bool
    identity: tuple[Named, ...]
    layers: Ranges | None
    experts: tuple[int, int] | None
    device: str
    simulate: str | None
    testing: bool
    backend: str
    trust: str
    tune: str
    cuda_graphs: str
    exact_routing: bool
    deterministic: bool
    host: str
    http_port: int
    grpc_port: int
    announce: str
    tokens: str | None
    tls_cert: str | None
    tls_key: str | None
    tls_client_ca: str | None
    allow_host: tuple[str, ...]
    model_root: str | None
    log: str
    drain_seconds: float
    max_message_bytes: int
    max_call_tokens: int
    max_batch_tokens: int
    batch_delay_us: int
    batch_invariant: bool
    expert_rows: bool
    max_queued_tokens: int
    max_queued_bytes: int
    max_concurrent_calls: int
    max_stream_calls: int
    max_header_bytes: int
    header_seconds: float
    ingress_bytes: int
    layout_cache_bytes: int | None
    threads: int


class Resolved(NamedTuple):
    """The settings, and for each where its value came from."""

    settings: Settings
    origins: dict[str, str]


def cache_directory() -> Path:
    """Where this user's caches lie: the demo checkpoint, proofs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertd"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting, and --config."""
    for setting in SETTINGS:
        shape: dict[str, Any] = {"metavar": setting.metavar}
        if setting.repeated:
            shape["action"] = "append"
        if setting.parse is parse_flag:
            shape = {"action": "store_const", "const": "true"}
        shown = "" if setting.default in (None, (), False) else f" (default {setting.default})"
        parser.add_argument(setting.flag, help=setting.help + shown, default=None, **shape)
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings", default=None)


def resolve(flags: argparse.Namespace, environment: Mapping[str, str]) -> Resolved:
    """The settings from all sources; raises InvalidArgument naming the setting and its source."""
    path = flags.config or environment.get("EXPERTD_CONFIG")
    table = _read_toml(Path(path)) if path else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in SETTINGS:
        given, origin = _find(setting, flags, environment, table, path)
        values[setting.name] = setting.default if given is None else _parse(setting, given, origin)
        origins[setting.name] = origin
    return Resolved(Settings(**values), origins)


KUBERNETES = ("EXPERTD_PORT", "EXPERTD_SERVICE_")
"""How the variables begin that every container gets beside a service by the name of expertd."""


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: a slip, or another program's."""
    known = {"EXPERTD_CONFIG", *(setting.variable for setting in SETTINGS)}
    ours = (name for name in environment if name.startswith("EXPERTD_"))
    return sorted(name for name in ours if name not in known and not name.startswith(KUBERNETES))


def _find(
    setting: Setting,
    flags: argparse.Namespace,
    environment: Mapping[str, str],
    table: Mapping[str, Any],
    path: str | None,
) -> tuple[list[Any] | None, str]:
    """What the first source gives that has the setting, and that source's name."""
    if (given := getattr(flags, setting.name)) is not None:
        return (given if setting.repeated else [given]), f"flag {setting.flag}"
    if (text := environment.get(setting.variable)) is not None:
        return (text.split(",") if setting.repeated else [text]), f"variable {setting.variable}"
    if setting.name in table:
        value = table[setting.name]
        return (value if isinstance(value, list) else [value]), f"{setting.name} in {path}"
    return None, "default"


def _parse(setting: Setting, given: list[Any], origin: str) -> Any:
    try:
        parsed = tuple(_value(setting, value) for value in given)
    except ValueError as error:
        shown = ", ".join(map(str, given))[:200]
        raise InvalidArgument(f"{origin}: {shown!r} given; {error}") from None
    if not setting.repeated and len(parsed) != 1:
        raise InvalidArgument(f"{origin}: one value is accepted")
    return parsed if setting.repeated else parsed[0]


def _value(setting: Setting, given: Any) -> Any:
    """What a text, or a TOML file's value, stands for: there 8 is no name, and 1 is not true."""
    if isinstance(given, str):
        return setting.parse(given)
    parsed = setting.parse(str(given).lower() if isinstance(given, bool) else str(given))
    if isinstance(parsed, bool) and parsed is not given:
        raise ValueError("true or false is accepted")
    if isinstance(parsed, str):
        raise ValueError("a text in quotes is accepted")
    return parsed


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument(f"--config {path}: {error}") from None
    known = {setting.name for setting in SETTINGS}
    if unknown := sorted(set(table) - known):
        accepted = ", ".join(sorted(known))
        raise InvalidArgument(f"--config {path}: unknown settings {unknown}; accepted: {accepted}")
    return table
