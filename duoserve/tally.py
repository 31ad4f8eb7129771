"""Turns what contenders answered into rows of results. Knows samples, needs and the machine's rates; knows nothing of
processes, files or how anything was run.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass
from typing import Any

from duoserve.contest import Contender, Outcome
from duoserve.estimate import Limit, Needs, limit
from duoserve.peers import LLAMA_CPP
from duoserve.profile import Profile
from duoserve.results import KIND, VERSION, Record, deviation, percentile

OURS = "duoserve"


@dataclass(frozen=True)
class Setting:
    """What all rows of a benchmark share. `needs` of a token by engine: the peers' weights have 16 bits.

    `link`: bytes/s that copies are slowed to, if they are.
    """

    model: str
    machine: dict[str, str | None]
    build: dict[str, Any]  # build_commit, build_number
    checksums: dict[str, str]  # of prompt sets, by name
    in_turns: bool
    time: str
    new_tokens: int
    profile: Profile | None
    needs: Needs | None
    peer_needs: Needs | None
    link: int | None = None


def record(outcome: Outcome, phase: str, setting: Setting) -> Record:
    """One row. Where its contender failed on the way, `error` says why, whatever samples there were before."""
    contender, about, samples = outcome.contender, outcome.about, outcome.samples[phase]
    error = outcome.error or (None if samples else "no samples")
    return (
        _who(outcome, phase, setting)
        | _decode(samples, outcome.cell.batch)
        | _requests(samples)
        | _experts(samples, outcome.cell.batch)
        | {"paged_bytes": _paged(samples) if contender.engine == OURS and about.get("device") == "cpu" else None}
        | _link(samples, contender, about, setting)
        | _limit(samples, contender, about, outcome.cell.batch, setting)
        | {
            "load_s": _mean(outcome.load_s),
            "rss_peak_bytes": max((s["rss_peak_bytes"] for s in samples), default=None),
            "used_bytes": max((s["used_bytes"] for s in samples if s["used_bytes"]), default=None),
            "tokens_sha256": _sha256(samples),
            "error": error,
            "machine": setting.machine,
        }
    )


def _who(outcome: Outcome, phase: str, setting: Setting) -> Record:
    contender, about, cell = outcome.contender, outcome.about, outcome.cell
    names = ("policy", "residency", "slots", "experts", "format", "trunk", "dtype", "predictor", "budget_bytes")
    machine = setting.machine
    return (
        {"kind": KIND, "version": VERSION}
        | setting.build
        | {
            "cpu_info": machine.get("cpu"),
            "gpu_info": machine.get("gpu0"),
            "backends": about.get("device"),
            "model_filename": setting.model,
            "model_type": f"{about['model_type']} {about['format']}" if about else None,
            "model_size": about.get("model_size"),
            "model_n_params": about.get("model_n_params"),
            "n_batch": cell.batch,
            "n_threads": about.get("n_threads"),
            "n_prompt": _mean([s["prompt_tokens"] for s in outcome.samples[phase]]),
            "n_gen": setting.new_tokens,
            "test_time": setting.time,
            "row": contender.row,
            "engine": contender.engine,
        }
        | {name: about.get(name) for name in names}
        | {
            "routes": contender.routes,
            "link": setting.link if contender.engine == OURS else None,
            "cap_bytes": contender.cap,
            "prompts": cell.prompts,
            "prompts_sha256": setting.checksums.get(cell.prompts),
            "phase": phase,
            "in_turns": setting.in_turns,
        }
    )


def _decode(samples: list[Any], batch: int) -> Record:
    decoded = [s for s in samples if s["steps"]]
    ns = [round(1e9 * s["decode_s"]) for s in decoded]
    ts = [batch * s["steps"] / s["decode_s"] for s in decoded]
    return {
        "avg_ns": _mean(ns),
        "stddev_ns": deviation(ns),
        "samples_ns": ns,
        "avg_ts": _mean(ts),
        "stddev_ts": deviation(ts),
        "samples_ts": ts,
    }


def _requests(samples: list[Any]) -> Record:
    ttft, e2e = [s["ttft_s"] for s in samples], [s["e2e_s"] for s in samples]
    found: Record = {"samples_ttft_s": ttft, "samples_e2e_s": e2e}
    found["ttft_s"] = percentile(ttft, 0.5) if ttft else None
    return found | {f"e2e_p{p}_s": percentile(e2e, p / 100) if e2e else None for p in (50, 95, 99)}


def _experts(samples: list[Any], batch: int) -> Record:
    """Of decode; stalls of whole requests."""
    counts = {name: sum(s["decode"][key] for s in samples) for name, key in COUNTED}
    asked, tokens = sum(counts.values()), sum(s["steps"] for s in samples) * batch
    causes = sorted({cause for s in samples for cause in s["stall_s"]})
    return {name: n / asked if asked else None for name, n in counts.items()} | {
        "bytes_per_token": sum(_moved(s["decode"]) for s in samples) / tokens if tokens else None,
        "ttft_bytes": _mean([_moved(s["prefill"]) for s in samples]),
        "stall_s": {cause: _mean([s["stall_s"].get(cause, 0.0) for s in samples]) for cause in causes},
    }


COUNTED = (("hit", "hits"), ("in_flight", "in_flight"), ("miss", "misses"))


def _moved(counts: dict[str, float]) -> float:
    """Bytes over our link; of who has none, from disk."""
    return counts["moved"] or counts["read"]


def _paged(samples: list[Any]) -> float | None:
    parts = [(s["prefill"], s["decode"]) for s in samples]
    return _mean([max(0, sum(part["read"] - part["moved"] for part in both)) for both in parts])


def _link(samples: list[Any], contender: Contender, about: dict[str, Any], setting: Setting) -> Record:
    parts = [part for s in samples for part in (s["prefill"], s["decode"])]
    moved, busy = sum(p["moved"] for p in parts), sum(p["busy_s"] for p in parts)
    rate = moved / busy if busy else None
    road = _road(contender, about, setting)
    return {
        "link_gbps": rate / 1e9 if rate else None,
        "link_rate_gbps": road[0] / 1e9 if road else None,
        "link_share": rate / road[0] if rate and road else None,
    }


def _road(contender: Contender, about: dict[str, Any], setting: Setting) -> tuple[float, str] | None:
    """Bytes/s of the way that absent experts come, measured with nothing else to do, and its name."""
    profile = setting.profile
    if setting.link is not None and contender.engine == OURS:
        return float(setting.link), "link"
    if profile is None or not about:
        return None
    if profile.link is not None and about.get("device") != "cpu":
        return profile.link.pinned, "link"
    largest = max(rate.request_bytes for rate in profile.disk)
    return profile.disk_rate(about.get("slab_bytes", largest), 2), "disk"


def _limit(samples: list[Any], contender: Contender, about: dict[str, Any], batch: int, setting: Setting) -> Record:
    steps = sum(s["steps"] for s in samples)
    road = _road(contender, about, setting)
    ours = contender.engine == OURS
    needs = setting.needs if ours else setting.peer_needs
    if not steps or road is None or setting.profile is None or needs is None:
        return {"limit_s": None, "limited_by": None, "share_of_limit": None}
    asked = sum(s["decode"][key] for s in samples for _, key in COUNTED) / steps
    experts = asked * about["slab_bytes"] if ours else needs.active_bytes
    read = _width(contender, about) * (needs.trunk_bytes + experts) + batch * needs.kv_bytes
    moved = sum(_moved(s["decode"]) for s in samples) / steps
    least: Limit = limit(read, moved, setting.profile.memory, *road)
    measured = statistics.median(s["decode_s"] / s["steps"] for s in samples if s["steps"])
    return {"limit_s": least.seconds, "limited_by": least.by, "share_of_limit": least.seconds / measured}


def _width(contender: Contender, about: dict[str, Any]) -> float:
    """Of the weights, against what the needs say: those of a GGUF have its mean bits instead of 16."""
    return about["model_size"] / (2 * about["model_n_params"]) if contender.engine == LLAMA_CPP else 1.0


def _mean(values: list[Any]) -> float | None:
    return statistics.fmean(values) if values else None


def _sha256(samples: list[Any]) -> str | None:
    """Of the tokens, in order."""
    return hashlib.sha256(repr([s["tokens"] for s in samples]).encode()).hexdigest() if samples else None
