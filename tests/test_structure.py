"""The house keeps its floors: imports go down only, the machine is one file, nothing that is loaded can run code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {
        *("version", "core", "config", "device", "native", "int4", "codec", "checkpoint", "folder", "published"),
        *("hub", "sizing", "durable", "headers", "attention", "routers", "benefit", "system", "sampling", "stopping"),
    },
    1: {"store", "cache", "experts", "trunk", "manifest", "shelf"},
    2: {"convert", "transfer", "profile"},
    3: {"prefill", "decode", "ahead", "estimate"},
    4: {"moe"},
    5: {"plan", "together"},
    6: {"model", "needs"},
    7: {"engine"},
    8: {"conversation", "outlook", "measure", "service"},
    9: {"repl", "doctor", "api", "remote"},
    10: {"opening"},
    11: {"tracing", "learning", "serving"},
    12: {"cli"},
}
ROOF = {"opening", "tracing", "learning", "serving", "cli"}  # these alone put what learns and what serves together
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
SIDE_BY_SIDE = {
    ("config", "core"),
    ("decode", "ahead"),
    ("device", "core"),
    ("device", "system"),
    ("codec", "core"),
    ("codec", "int4"),
    ("int4", "native"),
    ("checkpoint", "core"),
    ("checkpoint", "folder"),
    ("checkpoint", "published"),
    ("published", "core"),
    ("folder", "core"),
    ("sizing", "core"),
    ("hub", "core"),
    ("hub", "folder"),
    ("hub", "device"),
    ("headers", "core"),
    ("checkpoint", "headers"),
    ("folder", "headers"),
    ("store", "manifest"),
    ("api", "api"),
    ("shelf", "manifest"),
}
MACHINE = re.compile(
    r"torch\.cuda|pin_memory|cudart|cudaHost|\.cuda\(|threading\.Thread\b|ThreadPoolExecutor|Stream\(\)"
)
RUNS_CODE = re.compile(
    r"\bimport (pickle|marshal|shelve|joblib|dill)\b|torch\.load\(|allow_pickle\s*=\s*True|yaml\.load\(|"
    r"trust_remote_code\s*=\s*True|shell\s*=\s*True"
)


def files(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "duoserve":
                yield from (f"duoserve.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", files("duoserve"), ids=lambda p: p.stem)
def test_imports_go_down_only(path: Path) -> None:
    if path.name == "__init__.py":
        return
    for module in imports(path):
        package, _, rest = module.partition(".")
        beside = ("predictor", "traces", "dep_extension")
        assert package not in beside or path.stem in ROOF, f"{path.name} imports {module}"
        if package == "duoserve" and rest:
            name, below = path.relative_to(ROOT / "duoserve").parts[0].removesuffix(".py"), rest.split(".")[0]
            allowed = FLOOR[below] < FLOOR[name] or (name, below) in SIDE_BY_SIDE
            assert allowed, f"{path.name} (floor {FLOOR[name]}) imports {below} (floor {FLOOR[below]})"


def test_what_stands_beside_imports_only_the_words() -> None:
    for path in files("predictor", "traces"):
        plain = {f"duoserve.{name}" for name in ("core", "routers", "durable", "headers", "version", "native")}
        assert {m for m in imports(path) if m.startswith("duoserve.")} <= plain
        if path.parts[-2] == "traces":
            assert not {m for m in imports(path) if m.startswith("predictor")}
    for path in files("dep_extension"):
        assert not {m for m in imports(path) if m.startswith(("duoserve", "predictor", "traces"))}


@pytest.mark.parametrize("path", files("duoserve"), ids=lambda p: p.stem)
def test_only_device_names_cuda_pinning_and_threads(path: Path) -> None:
    if path.name != "device.py":
        assert not MACHINE.search(path.read_text()), MACHINE.search(path.read_text())


@pytest.mark.parametrize("path", files("duoserve", "predictor", "traces", "dep_extension"), ids=lambda p: p.stem)
def test_nothing_that_is_loaded_can_run_code(path: Path) -> None:
    assert not RUNS_CODE.search(path.read_text())
    calls = {
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert not calls & {"eval", "exec", "__import__"}


def test_cache_and_core_import_no_torch() -> None:
    for name in ("core", "cache", "config", "durable", "headers", "manifest", "shelf"):
        assert not any(
            m == "torch" or m.startswith("torch.") for m in imports_at_runtime(ROOT / "duoserve" / f"{name}.py")
        )


def imports_at_runtime(path: Path) -> Iterator[str]:
    """Imports at module level, those for type checkers apart."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
