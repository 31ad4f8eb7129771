"""Opens an engine together with what guesses for it. The roof over the engine and the predictors: knows where a predictor is
to be found; knows nothing of how it guesses.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from duoserve import engine as engines
from duoserve.core import Policy, Predictor, Refusal
from duoserve.engine import DEMO, Engine

NONE, GATE = "none", "gate"
ASKING = {policy.value for policy in (Policy.DUOSERVE, Policy.PAPER, Policy.MIF)}  # a predictor


def load(
    model: str | os.PathLike[str] | None = None, *, predictor: Any = None, progress: Any = None, **options: Any
) -> Engine:
    """Open MODEL (checkpoint folder, expert store, hub id, or None for the demo) within a memory budget.

    `predictor`: a folder that `duoserve train` wrote, "gate" (the next layer's own router on this layer's input, nothing
    trained), "none", or any `duoserve.core.Predictor`; without one, the demo takes the one that comes with it and other
    models guess nothing. Everything else as `duoserve.engine.load`, whose documentation lists the options.
    """
    policy = options.get("policy", Policy.DUOSERVE.value)
    if policy not in ASKING:
        if predictor not in (None, NONE):
            raise Refusal("E_OPTION", f"policy {policy!r} asks 0 predictors", "leave --predictor out")
        predictor = NONE
    found = _found(model, predictor)
    opened = engines.load(model, progress=progress, predictor=found, **options)
    if predictor == GATE:
        from predictor.baselines import Gate

        opened.predict(Gate(opened.routers()))
    return opened


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
