"""Which checkpoints a process may load: the operator's models, within --model-root."""

from __future__ import annotations

from pathlib import Path

from expertd import __version__
from expertd.config import Settings, cache_directory
from expertd.engine.loader import ModelSource
from expertd.errors import InvalidArgument
from expertd.weights.demo import write_demo


def model_sources(settings: Settings) -> list[ModelSource]:
    """Every configured checkpoint; raises InvalidArgument for a path outside --model-root."""
    paths = [(named.name, Path(named.value)) for named in settings.model]
    for name, path in paths:
        check_root(settings, name, path)
    if settings.demo:
        paths.append(("demo", demo_path()))
    layers = settings.layers
    numbers = None if layers is None else frozenset(n for a, b in layers for n in range(a, b + 1))
    experts = None if settings.experts is None else (settings.experts[0], settings.experts[1] + 1)
    return [ModelSource(name, path, numbers, experts) for name, path in paths]


def check_root(settings: Settings, name: str, path: Path) -> None:
    """Raises InvalidArgument if the path or a file in it, links resolved, leads out of the root."""
    if settings.model_root is None:
        return
    root = Path(settings.model_root).resolve()
    for found in (path, *path.glob("*")):
        if not found.resolve().is_relative_to(root):
            raise InvalidArgument(f"model {name}: {found} does not lie under --model-root {root}")


def check_source(settings: Settings, source: ModelSource) -> None:
    """The same again before a load at run time: links may lead elsewhere by then."""
    if source.name in {named.name for named in settings.model}:
        check_root(settings, source.name, source.path)


def demo_path() -> Path:
    """The demo checkpoint in the user's cache directory, made if it is not there."""
    path = cache_directory() / f"demo-{__version__}"
    try:
        if not path.exists():
            write_demo(path)
    except InvalidArgument:
        if not path.exists():  # or else another process has made it meanwhile
            raise
    return path
