"""The imports of a source tree, read without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "expertd": ROOT / "service/expertd",
    "expertd_client": ROOT / "clients/expertd_client",
    "expertd_wire": ROOT / "proto/expertd_wire",
}


class Import(NamedTuple):
    """One import: the file and line, the importing module and what it names."""

    place: str
    importer: str
    imported: str


def sources(package: str) -> Iterator[Path]:
    """The hand-written modules of a package."""
    return (p for p in sorted(PACKAGES[package].rglob("*.py")) if "_pb2" not in p.name)


def module_name(path: Path, package: str) -> str:
    inside = path.relative_to(PACKAGES[package].parent).with_suffix("")
    return ".".join(part for part in inside.parts if part != "__init__")


def imports(package: str) -> Iterator[Import]:
    """Every import of a package, those inside functions too."""
    for path in sources(package):
        importer = module_name(path, package)
        for line, names in read(path.read_text(), importer, path.name == "__init__.py"):
            for name in names:
                yield Import(f"{path.relative_to(ROOT)}:{line}", importer, name)


def read(source: str, importer: str, is_package: bool) -> Iterator[tuple[int, list[str]]]:
    """Lines of import statements with the full names they bind."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield node.lineno, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, importer, is_package)
            yield node.lineno, [f"{base}.{alias.name}" for alias in node.names]


def _base(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    """The absolute module of a from-import."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])
