"""Opens an engine together with what guesses for it. The roof over the engine and the predictors: knows where a predictor is
to be found; knows nothing of how it guesses.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from duoserve import engine as engines
from duoserve.config import EngineConfig
from duoserve.core import Kernels, Policy, Predictor, Refusal
from duoserve.device import gpus
from duoserve.engine import DEMO, Engine
from duoserve.future import Future
from duoserve.system import use_threads

NONE, GATE = "none", "gate"
MEASURE = "run `duoserve dep kernels MODEL --save FILE` here"
ASKING = {policy.value for policy in (Policy.DUOSERVE, Policy.PAPER, Policy.MIF)}  # a predictor
TAKES_THE_DEMOS = ASKING - {Policy.MIF.value}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    predictor: Any = None,
    future: Future | None = None,
    progress: Any = None,
    **options: Any,
) -> Engine:
    """Open MODEL (checkpoint folder, expert store, hub id, or None for the demo) within a memory budget.

    `predictor`: a folder that `duoserve train` wrote, "gate" (the next layer's own router on this layer's input, nothing
    trained), "none", or any `duoserve.core.Predictor`; without one, the demo takes the one that comes with it and other
    models guess nothing; policy "mif" then goes by what it has seen itself. `future`: what the passes will choose, recorded
    before; policy "belady" needs it. `kernels`: a file that `duoserve dep kernels` wrote on this machine. Everything else as
    `duoserve.engine.load`, whose documentation lists the options.
    """
    policy = options.get("policy", Policy.DUOSERVE.value)
    if policy not in ASKING and predictor not in (None, NONE):
        raise Refusal("E_OPTION", f"policy {policy!r} asks 0 predictors", "leave --predictor out")
    if predictor is None and policy not in TAKES_THE_DEMOS:
        predictor = NONE
    if policy == Policy.BELADY.value and future is None:
        what = "policy 'belady' evicts by the future, and 0 recorded passes are given"
        raise Refusal("E_OPTION", what, "replay a recording: duoserve.load(..., future=Future.of(steps, experts))")
    found = _found(model, predictor)
    table = read_table(options)
    opened = engines.load(model, progress=progress, predictor=found, table=table, **options)
    if future is not None and policy == Policy.BELADY.value:
        opened.foresee(future)
    if predictor == GATE:
        from predictor.baselines import Gate

        opened.predict(Gate(opened.routers()))
    return opened


def read_table(options: dict[str, Any]) -> Kernels | None:
    """The file that the option `kernels` names, measured here (this processor or GPU, as many threads); None without one."""
    path = options.get("kernels")
    if path is None:
        return None
    from dep_extension.kernel_choice import Table
    from dep_extension.kernel_table import here

    config = EngineConfig.of(**options)
    use_threads(config.threads)
    on_gpu = config.device == "cuda" or (config.device == "auto" and bool(gpus()))
    try:
        return Table.load(Path(path), here("cuda" if on_gpu else "cpu"))
    except OSError as error:
        raise Refusal("E_KERNELS", f"{path}: {error.strerror or error}", MEASURE, 3) from error
    except ValueError as error:
        raise Refusal("E_KERNELS", str(error), MEASURE) from error


def predictor_bytes(model: Any, predictor: Any = None) -> int:
    """Bytes that the predictor `load` would take for MODEL counts in the budget."""
    found = _found(model, predictor)
    return found.n_bytes if found is not None else 0


def _found(model: Any, predictor: Any) -> Predictor | None:
    if predictor is None:
        predictor = DEMO / "predictor" if model is None and (DEMO / "predictor").is_dir() else NONE
    if predictor in (NONE, GATE):
        return None
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    from predictor.load import load as load_predictor

    return load_predictor(Path(predictor))
