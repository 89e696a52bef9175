"""The shape of the code: short files, imports along the arrows, declared needs, one wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from tests.imports import PACKAGES, ROOT, Import, imports, module_name, read, sources
from tests.processes import assert_runs

MOST_LINES = 400
HAND_WRITTEN = {".py", ".pyi", ".proto", ".sh", ".md", ".toml", ".yaml", ".yml", ".js", ".html", ""}
FOLDERS = (".ci", "clients", "deploy", "docs", "proto", "service", "tests", "tools")

ROOMS = (
    ("core", "errors", "config", "logs"),
    ("routing",),
    ("weights",),
    ("capability",),
    ("backends",),
    ("proof",),
    ("engine",),
    ("metrics",),
    ("transport",),
    ("preflight", "simulate", "sources", "steward", "app", "bench", "cli"),
)
"""A room imports from its own row and from those above."""

RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}
ASSERTING = ("assert_", "check", "compare", "raises", "warns", "until")
"""How the name of what asserts for a test begins."""

CLIENT_USERS = ("bench", "cli")
"""Rooms of the server that may be a client too."""

WITHOUT_TORCH = (
    *("expertd.config", "expertd.errors", "expertd.routing", "expertd.routing.derive"),
    *("expertd.weights.headers", "expertd.weights.layers", "expertd.cli"),
    *(
        f"expertd.cli.{command}"
        for command in ("bench", "call", "capabilities", "counts", "explain", "health", "plan")
    ),
)
"""What works in an install without torch, besides all of core, capability and the client."""


def hand_written() -> Iterator[Path]:
    """Every file that somebody wrote and keeps."""
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix in HAND_WRITTEN)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in HAND_WRITTEN and "_pb2" not in path.name:
                yield path


def test_hand_written_files_are_short() -> None:
    texts = {path: path.read_text() for path in hand_written() if path.name != "LICENSE"}
    lengths = {str(path.relative_to(ROOT)): text.count("\n") for path, text in texts.items()}
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def against_the_arrows(found: Import) -> bool:
    """Whether an import of one of our packages goes up, or out where it must not."""
    package, _, rest = found.importer.partition(".")
    target, _, inside = found.imported.partition(".")
    if target not in PACKAGES or target == "expertd_wire":
        return False
    if package != "expertd":
        return target != package
    room = rest.partition(".")[0]
    if target == "expertd_client":
        return room not in CLIENT_USERS
    imported = inside.partition(".")[0]
    return imported in RANK and RANK[room] < RANK[imported]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    found = list(imports(package))
    assert found
    assert [wrong for wrong in found if against_the_arrows(wrong)] == []


def test_every_room_has_its_place() -> None:
    names = (module_name(path, "expertd").split(".") for path in sources("expertd"))
    rooms = {parts[1] for parts in names if parts[1:]}
    assert rooms - RANK.keys() == set()


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("expertd.core.layer", "expertd.routing.derive", True),
        ("expertd.capability.match", "expertd.proof.store", True),
        ("expertd.metrics", "expertd.transport.calls", True),
        ("expertd.engine.engine", "expertd_client.Client", True),
        ("expertd_client.client", "expertd.errors", True),
        ("expertd_wire.codec", "expertd_client.errors", True),
        ("expertd.transport.calls", "expertd.metrics.registry.Metrics", False),
        ("expertd.app", "expertd.__version__", False),
        ("expertd.cli.call", "expertd_client.Client", False),
        ("expertd_client.client", "expertd_wire.codec", False),
    ],
)
def test_the_arrows_themselves(importer: str, imported: str, wrong: bool) -> None:
    assert against_the_arrows(Import("", importer, imported)) is wrong


def test_no_import_is_overlooked() -> None:
    source = "def f():\n  from . import b\nfrom ..c import d\nimport e.f as g\n"
    assert sorted(read(source, "p.q.r", is_package=False)) == [
        (2, ["p.q.b"]),
        (3, ["p.c.d"]),
        (4, ["e.f"]),
    ]
    assert list(read("from .b import c", "p.q", is_package=True)) == [(1, ["p.q.b.c"])]


def names_that_assert(function: ast.AST) -> Iterator[str]:
    """Each assert statement, and each call whose name says that it may fail."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            yield "assert"
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith(ASSERTING):
                yield name


def without_assertion(source: str) -> list[str]:
    """The tests that could not fail but by chance."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tests = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return [t.name for t in tests if t.name.startswith("test_") and not [*names_that_assert(t)]]


def test_every_test_asserts() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    found = {str(p.relative_to(ROOT)): without_assertion(p.read_text()) for p in files}
    assert len(found) > 100
    assert {file: names for file, names in found.items() if names} == {}


def test_a_test_that_only_runs_is_found() -> None:
    runs, asserts = "def test_a():\n  go()\n", "async def test_b():\n  assert go()\n"
    helps = "class T:\n  def test_c(self):\n    with pytest.raises(E):\n      go()\n"
    assert without_assertion(runs + asserts + helps) == ["test_a"]


def test_rooms_that_need_no_torch() -> None:
    """They are imported in a process where importing torch is an error."""
    packages = ("expertd.core", "expertd.capability", "expertd_client", "expertd_wire")
    allowed = {"expertd_client.torch", "expertd_client.integrations.transformers"}
    modules = [
        name
        for package in PACKAGES
        for name in (module_name(path, package) for path in sources(package))
        if name.startswith(packages) and name not in allowed
    ]
    code = "import sys, importlib; sys.modules['torch'] = None\n"
    code += "for name in sys.argv[1:]: importlib.import_module(name)"
    assert_runs(code, *modules, *WITHOUT_TORCH)


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml names for an install with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = list(project["dependencies"])
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in listed}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("expertd_wire", ()),
        ("expertd_client", ("torch", "transformers")),
        ("expertd", ("torch", "server", "gpu", "transformers")),
    ],
)
def test_imports_are_declared(package: str, extras: tuple[str, ...]) -> None:
    distributions = packages_distributions()
    for found in imports(package):
        top = found.imported.partition(".")[0]
        if top in sys.stdlib_module_names or top in PACKAGES:
            continue
        providers = {normal(name) for name in distributions[top]}
        assert providers & declared(*extras), f"{found.place}: {top} is of {sorted(providers)}"


@pytest.mark.parametrize("extra", ["base", "torch", "server", "gpu", "transformers", "dev"])
def test_dependencies_are_explained_and_pinned(extra: str) -> None:
    explained = (ROOT / "docs/dependencies.md").read_text()
    names = (declared() if extra == "base" else declared(extra)) - {"expertd"}
    unexplained = {name for name in names if f"| {name} |" not in explained}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.partition("==")[0]) for line in pins}
    assert (unexplained, names - pinned) == (set(), set())


def test_constraints_are_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert "torch==2.13.0" in pins


def test_the_wheel_holds_three_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    generated = ("experts.proto", "experts_pb2.py", "experts_pb2.pyi", "experts_pb2_grpc.py")
    assert {f"expertd_wire/v1/{name}" for name in generated} <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for package, folder in PACKAGES.items():
        there = {p for p in folder.rglob("*.*") if p.is_file() and "__pycache__" not in p.parts}
        assert {str(p.relative_to(folder.parent)) for p in there} - names == set(), package
