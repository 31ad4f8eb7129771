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
        *("attention", "benefit", "cap", "checkpoint", "codec", "config", "core", "decisions", "device", "durable"),
        *("folder", "foresight", "future", "headers", "hub", "int4", "native", "peers", "prompts", "published"),
        *("pulse", "results", "routers", "sampling", "sizing", "stopping", "system", "timeline"),
        *("columns", "console", "settings", "triton_int4", "version"),
    },
    1: {
        *("cache", "clock", "clockstream", "experts", "manifest", "road", "runfile", "shelf", "store", "trunk"),
        *("answer", "flags", "progress", "tokenizer"),
    },
    2: {"board", "contest", "convert", "grouped", "lanes", "profile", "transfer"},
    3: {
        *("activation", "ahead", "chrometrace", "crowd", "decode", "estimate", "fleet", "paper", "picture", "prefill"),
        *("sighted", "stopwatch", "wholelayer"),
    },
    4: {"costing", "llamacpp", "moe", "policies", "tally"},
    5: {"plan", "simulate", "together"},
    6: {"loading", "model", "needs"},
    7: {"engine", "specimens"},
    8: {"measure", "outlook", "service"},
    9: {"api", "doctor"},
    10: {"conversation", "deppicture", "depsubject", "opening"},
    11: {
        *("contender", "depcalibrate", "depcopies", "depsweep", "kernels", "learning", "matrix", "remote", "repl"),
        *("serving", "showing"),
        *("simulating", "tracing"),
        "shelving",
    },
    12: {"benching", "dep"},
    13: {"cli"},
}
ROOF = {
    "cli",
    "dep",
    "depcalibrate",
    "depcopies",
    "deppicture",
    "depsubject",
    "depsweep",
    "kernels",
    "learning",
    "opening",
    "serving",
    "simulating",
    "tracing",
}  # these alone join what learns, what plans for several GPUs and what serves
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
SIDE_BY_SIDE = {
    ("cap", "config"),
    ("cap", "core"),
    ("checkpoint", "core"),
    ("checkpoint", "folder"),
    ("checkpoint", "headers"),
    ("checkpoint", "published"),
    ("clock", "clockstream"),
    ("clock", "road"),
    ("codec", "core"),
    ("codec", "int4"),
    ("config", "core"),
    ("console", "core"),
    ("decode", "ahead"),
    ("device", "core"),
    ("device", "device"),
    ("device", "system"),
    ("device", "timeline"),
    ("folder", "core"),
    ("folder", "headers"),
    ("api", "api"),
    ("foresight", "core"),
    ("foresight", "future"),
    ("future", "core"),
    ("headers", "core"),
    ("hub", "core"),
    ("hub", "device"),
    ("hub", "folder"),
    ("int4", "native"),
    ("int4", "triton_int4"),
    ("moe", "policies"),
    ("paper", "ahead"),
    ("peers", "core"),
    ("prompts", "core"),
    ("prompts", "headers"),
    ("published", "core"),
    ("results", "core"),
    ("results", "durable"),
    ("results", "headers"),
    ("sampling", "settings"),
    ("settings", "core"),
    ("shelf", "manifest"),
    ("road", "clockstream"),
    ("sizing", "core"),
    ("store", "manifest"),
    ("timeline", "core"),
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


RUNS_THE_ENGINE = {
    "__main__",
    "answering",
    "attention",
    "executor",
    "recovery",
    "running",
    "shares",
}  # of dep_extension


@pytest.mark.parametrize("path", files("dep_extension"), ids=lambda p: p.stem)
def test_plans_and_exchanges_know_nothing_of_the_engine(path: Path) -> None:
    used = {m for m in imports(path) if m.startswith(("duoserve", "predictor", "traces"))}
    if path.stem in RUNS_THE_ENGINE:
        for module in used:
            assert module.startswith("duoserve."), f"{path.name} imports {module}"
            assert FLOOR[module.split(".")[1]] <= 7, f"{path.name} imports {module}"
    else:
        assert not used, f"{path.name} imports {used}"


@pytest.mark.parametrize("path", files("duoserve"), ids=lambda p: p.stem)
def test_only_the_devices_name_cuda_pinning_and_threads(path: Path) -> None:
    if path.parent.name != "device":
        assert not MACHINE.search(path.read_text()), MACHINE.search(path.read_text())


def test_the_devices_have_floors_and_know_nothing_of_each_other() -> None:
    floors = {"events": 0, "streams": 1, "cpu": 2, "cuda": 2}
    assert {path.stem for path in files("duoserve/device")} == {"__init__", *floors}
    for name, floor in floors.items():
        for module in imports(ROOT / "duoserve" / "device" / f"{name}.py"):
            if module.startswith("duoserve.device"):
                assert floors[module.split(".")[2]] < floor, f"{name}.py imports {module}"


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
    plain = (
        "core",
        "cache",
        "config",
        "durable",
        "flags",
        "headers",
        "manifest",
        "shelf",
        "timeline",
        "runfile",
        "lanes",
    )
    for name in plain:
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
