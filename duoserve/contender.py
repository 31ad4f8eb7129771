"""One contender of a benchmark, alone in its process: ours or a peer, which loads and answers when a line on stdin says so.

    python -m duoserve.contender       first line: what it is (`contest.Contender`), then requests, a line of JSON each:
    {"do": "ready"}                    everything is imported
    {"do": "open"}                     loads, or loads anew, with nothing of its files in the page cache
    {"do": "run", "ids": [[...]], "mask": [[...]], "pad": 0, "new_tokens": 32}      answers greedily
    {"do": "record", "requests": [{"ids": ..., "mask": ..., "pad": 0}], "new_tokens": 32}     what will be asked once it is
                                       opened next: answered now, unmeasured, for a policy that knows the future

Each is answered by one line of JSON, {"error": ...} where it failed. Both kinds are measured by the same code: transformers'
`generate`, its clock a stopping criterion that never stops. Knows both kinds; knows nothing of turns, caps or tables.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from duoserve import opening
from duoserve.cap import forget_files
from duoserve.checkpoint import quiet
from duoserve.contest import Contender
from duoserve.core import Policy, Step
from duoserve.engine import Engine
from duoserve.future import Future
from duoserve.moe import OffloadedExperts
from duoserve.peers import open_peer
from duoserve.stopwatch import Clock, Counts, attend, peak_rss, read_bytes
from duoserve.system import give_back, use_threads

OURS = "duoserve"
SEED = 0  # of uniform routes


class Subject(Protocol):
    """What is measured."""

    model: Any
    torch_device: torch.device  # where tokens go: `model.device` is meta where its embeddings lie on disk

    def about(self) -> dict[str, Any]: ...

    def counts(self) -> Counts: ...

    def stalls(self) -> dict[str, float]: ...

    def used_bytes(self) -> int | None: ...

    def close(self) -> None: ...


class Ours:
    """A DuoServe engine."""

    def __init__(self, contender: Contender, future: Future | None = None):
        self.engine: Engine = opening.load(contender.model, future=future, **contender.options)
        self.model, self.torch_device = self.engine.model, self.engine.device.torch_device
        if contender.routes == "uniform":
            uniform_routes(self.model)

    def about(self) -> dict[str, Any]:
        engine, stats = self.engine, self.engine.stats()
        predictor = engine.runtime.ahead.predictor
        names = ("slots", "experts", "residency", "format", "trunk", "dtype", "policy", "budget_bytes", "planned_bytes")
        return {name: stats[name] for name in names} | {
            "device": engine.device.name,
            "slab_bytes": engine.plan.slot_bytes,
            "predictor": predictor.name if predictor is not None else None,
            "model_n_params": engine.store.size.bf16_bytes // 2,
            "kernels": stats["kernels"]["table"] if stats["kernels"] else None,
        }

    def counts(self) -> Counts:
        counts, copy = self.engine.runtime.transfer.counts(), self.engine.device.copy
        asked = (counts.hits, counts.in_flight, counts.misses)
        return Counts(*asked, int(copy.cost_done), copy.busy_s, read_bytes())

    def stalls(self) -> dict[str, float]:
        return dict(self.engine.stats().get("stall_s") or {})

    def used_bytes(self) -> int | None:
        return int(self.engine.stats()["used_bytes"])

    def close(self) -> None:
        self.engine.close()


class Peer:
    """Stock transformers, or Accelerate."""

    def __init__(self, contender: Contender, scratch: Path):
        options = contender.options
        assert contender.model is not None, contender
        use_threads(options["threads"])
        self._options, self.torch_device = options, torch.device(options["device"])
        self.model = open_peer(
            contender.engine, Path(contender.model), options["dtype"], options["device"], options["memory"], scratch
        )

    def about(self) -> dict[str, Any]:
        return {
            "device": self._options["device"],
            "dtype": self._options["dtype"],
            "format": "float32" if self._options["dtype"] == "float32" else "bf16",
            "budget_bytes": self._options["memory"],
            "model_n_params": sum(p.numel() for p in self.model.parameters()),
        }

    def counts(self) -> Counts:
        return Counts(read=read_bytes())

    def stalls(self) -> dict[str, float]:
        return {}

    def used_bytes(self) -> int | None:
        return None

    def close(self) -> None: ...


def uniform_routes(model: Any) -> None:
    """Replace every route by distinct experts drawn uniformly: random weights repeat themselves, and fake hits."""

    def redraw(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ids, weights = args
        drawn = torch.rand(ids.shape[0], module.num_experts).topk(ids.shape[1], dim=1).indices
        return x, drawn.to(ids), weights

    for module in model.modules():
        if isinstance(module, OffloadedExperts):
            module.register_forward_pre_hook(redraw)


class _Ticking(transformers.StoppingCriteria):
    """Ticks with every token, and never stops."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._clock.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run(subject: Subject, ids: list[list[int]], mask: list[list[int]], pad: int, new_tokens: int) -> dict[str, Any]:
    """Figures of one request: seconds, bytes, counts, and the tokens themselves."""
    ids_BS = torch.tensor(ids, device=subject.torch_device)
    stalled = subject.stalls()
    clock = Clock(subject.counts)
    with torch.inference_mode():
        out = subject.model.generate(
            input_ids=ids_BS,
            attention_mask=torch.tensor(mask, device=ids_BS.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=transformers.StoppingCriteriaList([_Ticking(clock)]),
        )
    return clock.figures() | {
        "prompt_tokens": sum(map(sum, mask)) / len(mask),
        "stall_s": {cause: s - stalled.get(cause, 0.0) for cause, s in subject.stalls().items()},
        "tokens": out[:, ids_BS.shape[1] :].tolist(),
        "rss_peak_bytes": peak_rss(),
        "used_bytes": subject.used_bytes(),
    }


class Service:
    """Loads and answers."""

    def __init__(self, contender: Contender, scratch: Path):
        self._contender, self._scratch = contender, scratch
        self._subject: Subject | None = None
        self._future: Future | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        if do == "ready":
            return {}
        if do == "open":
            return self.open()
        if do == "record":
            return self.record(**request)
        assert self._subject is not None, do
        return run(self._subject, **request)

    def open(self) -> dict[str, Any]:
        self.close()
        for path in self._files():
            forget_files(path)
        torch.manual_seed(SEED)
        began = time.perf_counter()
        ours = self._contender.engine == OURS
        self._subject = Ours(self._contender, self._future) if ours else Peer(self._contender, self._scratch)
        load_s = time.perf_counter() - began
        for path in self._files():
            forget_files(path)
        sizes = [file.stat().st_size for file in Path(self._contender.folder).glob("*.safetensors")]
        about = {"load_s": load_s, "model_size": sum(sizes), "model_type": self._subject.model.config.model_type}
        about |= {"n_threads": torch.get_num_threads(), "rss_peak_bytes": peak_rss()}
        return self._subject.about() | about

    def record(self, requests: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
        """Routes do not depend on the policy: one that knows nothing makes those that will come."""
        self.close()
        known = self._contender.options | {"policy": Policy.LRU.value}
        steps: list[Step] = []
        torch.manual_seed(SEED)
        subject = Ours(replace(self._contender, options=known))
        subject.engine.runtime.observers.append(lambda step: steps.append(step))
        for request in requests:
            run(subject, **request, new_tokens=new_tokens)
        self._future = Future.of(steps, [layer.n_experts for layer in subject.engine.store.layers])
        subject.close()
        return {"passes": len(steps)}

    def _files(self) -> Iterator[Path]:
        yield Path(self._contender.folder)
        yield self._scratch

    def close(self) -> None:
        if self._subject is not None:
            self._subject.close()
        self._subject = None
        gc.collect()
        give_back()


def main() -> None:
    quiet()
    attend(Service)


if __name__ == "__main__":
    main()
