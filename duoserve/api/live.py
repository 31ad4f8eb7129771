"""One look at a serving engine, as plain values for the page: which experts are here, what is flying, what it came to.

Knows what to read and how to write it shortly; changes nothing. A look takes the transfer's lock for less than a
millisecond, so that a page may ask many times a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from duoserve.core import Key

if TYPE_CHECKING:
    from duoserve.device import Traffic
    from duoserve.engine import Engine
    from duoserve.moe import Runtime
    from duoserve.service import Service

# One letter per expert, one string per layer.
ABSENT, RESIDENT, USED, GUESSED, ARRIVING, COMING = ".", "r", "u", "g", "a", "c"
STATES = {
    ABSENT: "absent",
    RESIDENT: "resident",
    USED: "resident, in use now",
    GUESSED: "resident, guessed for a layer that has not run",
    ARRIVING: "arriving because it is needed",
    COMING: "arriving because it is guessed",
}
SHOWN = 12  # names of experts per lane: the page draws no more


def snapshot(engine: Engine, service: Service) -> dict[str, Any]:
    """What `GET /v1/expert-cache` says. Bytes, seconds, counts since the engine was loaded."""
    stats = engine.stats()
    return {
        "object": "expert_cache",
        "model": engine.store.folder.name,
        **{name: stats[name] for name in ("device", "format", "trunk", "dtype", "policy", "ctx", "slots", "experts")},
        "states": STATES,
        **_experts(engine.runtime, [layer.n_experts for layer in engine.store.layers]),
        "counts": {name: stats[name] for name in _COUNTS},
        "bytes_moved": stats["bytes_moved"],
        "link_busy_s": stats["link_busy_s"],
        "prediction": stats["prediction"],
        "memory": _memory(stats),
        "requests": {
            "active": service.active,
            "queued": service.queued,
            "most_active": service.limits.active,
            "most_queued": service.limits.queue,
            "finished": dict(service.finished),
            "reading": service.reading(),
        },
    }


_COUNTS = (
    *("hits", "in_flight", "misses", "evictions"),
    *("guesses", "guesses_ready", "guesses_late", "guesses_wrong", "steps"),
)
_PARTS = {
    "trunk": "attention, routers, embeddings",
    "predictor": "predictor",
    "scratch": "scratch",
    "kv": "keys and values",
    "slots": "slots for experts",
}


def _experts(runtime: Runtime, per_layer: list[int]) -> dict[str, Any]:
    """The pool, the lanes and the pass that runs, at one moment."""
    transfer, copy, disk = runtime.transfer, runtime.device.copy, runtime.device.disk
    with transfer.lock:
        view, guessed, step = runtime.cache.view(), transfer.guessed, runtime.running
        lanes, reads = copy.traffic(), disk.traffic() if disk is not None else None
    first = np.concatenate([[0], np.cumsum(per_layer)])
    letters = np.where(view.resident, ord(RESIDENT), ord(ABSENT)).astype(np.uint8)
    letters[view.pinned] = ord(USED)
    _mark(letters, first, guessed, GUESSED)
    for lane, letter in zip(lanes, (ARRIVING, COMING), strict=True):
        _mark(letters, first, (*lanes[lane].waiting, *lanes[lane].running), letter)
    heat = (np.clip(view.heat, 0, 1) * 9.0 + 0.5).astype(np.uint8) + ord("0")
    return {
        "layers": len(per_layer),
        "experts_per_layer": per_layer,
        "state": _by_layer(letters, first),
        "heat": _by_layer(heat, first),
        "lanes": _lanes(lanes),
        "disk_lanes": _lanes(reads) if reads is not None else None,
        "pass": {"phase": step.phase.value, "rows": step.rows, "layer": view.turn} if step is not None else None,
    }


def _mark(letters: np.ndarray, first: np.ndarray, keys: Iterable[Key], letter: str) -> None:
    for key in keys:
        letters[first[key.layer] + key.expert] = ord(letter)


def _by_layer(letters: np.ndarray, first: np.ndarray) -> list[str]:
    text = letters.tobytes().decode("ascii")
    return [text[start:end] for start, end in pairwise(first.tolist())]


def _lanes(lanes: dict[Any, Traffic]) -> dict[str, Any]:
    return {
        lane.name.lower(): {
            "queued": len(traffic.waiting),
            "flying": traffic.running[:SHOWN],
            "next": traffic.waiting[:SHOWN],
            "last": traffic.last[-SHOWN:],
            "done": traffic.done,
        }
        for lane, traffic in lanes.items()
    }


def _memory(stats: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {
            "part": name,
            "what": what,
            "planned": stats["planned"][f"{name}_bytes"],
            "used": stats["used"][f"{name}_bytes"],
        }
        for name, what in _PARTS.items()
    ]
    return {
        "budget": stats["budget_bytes"],
        "planned": stats["planned_bytes"],
        "used": stats["used_bytes"],
        "parts": parts,
    }
