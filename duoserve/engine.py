"""Load a model and generate with it. Knows prompts, what an engine is made of, and its figures; knows no slots or files."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from queue import SimpleQueue
from typing import Any

import torch
import transformers

from duoserve.answer import Answer, Cancel, Meter, asked_tokens, check_options, ends, padding, refused, room
from duoserve.checkpoint import check_config, quiet, read_config
from duoserve.config import EngineConfig, parse_size
from duoserve.convert import Progress
from duoserve.core import Kernels, Policy, Predictor, Refusal
from duoserve.device import Device, in_background, open_device
from duoserve.future import Future
from duoserve.hub import resolve
from duoserve.loading import DEMO, open_model
from duoserve.model import load_model
from duoserve.moe import Cancelled
from duoserve.plan import Plan
from duoserve.routers import Router, routers_of
from duoserve.store import Store
from duoserve.system import give_back, use_threads
from duoserve.timeline import Timeline
from duoserve.tokenizer import Prompt, encode, read_tokenizer

__all__ = ["DEMO", "Answer", "Engine", "load"]


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    predictor: Predictor | None = None,
    table: Kernels | None = None,
    **options: Any,
) -> Engine:
    """Open MODEL (checkpoint folder, expert store, hub id, or None for the demo) within a memory budget.

    Options: `budget` "6GiB", "15%" (of the bf16 checkpoint), "min" (two slots), "half" (of the experts), or bytes;
    without one, what is free now less a margin. It covers trunk, slots and the keys and values of `ctx` tokens.
    `format` int4 (default), nf4, bf16: of the experts, converted once and kept in `cache_dir`. `trunk` likewise: of its
    linears and head, quantised while loading; on the CPU int4 unless the experts are bf16. `dtype` of the rest and of
    arithmetic (default: bfloat16); with "float32" and no `format`, experts stay unquantised, so that logits equal the
    stock float32 model's. `device` auto, cpu, cuda. `threads` of torch's arithmetic, in all of this process (default:
    $OMP_NUM_THREADS, else the real cores that may be used). `predictor` guesses ahead while that pays, its memory counted
    in the budget. `sequences`: how many of `ctx` tokens keys and values are planned for (1). `policy` duoserve, or, to
    compare with, one of `duoserve.core.Policy`. `slots` at most, a number or "top-k" (as many as a token chooses in one
    layer, as in the paper). `link` slows copies to so many bytes per second, for experiments (CPU). `progress` is told of
    a download or conversion: bytes done, in all, what. `table`, which `kernels` names: computes a layer's unquantised
    experts as one grouped product wherever it was measured to be quicker than one after the other. That is another
    arithmetic: tokens are then those of this table, whatever the budget.
    Unknown options, and budgets below the smallest, raise `Refusal` (a ValueError) of one line.
    """
    quiet()
    config = EngineConfig.of(**options)
    folder = DEMO if model is None else resolve(model, progress, check_config)
    use_threads(config.threads)
    with contextlib.ExitStack() as unless_loaded:
        device = open_device(config.device, parse_size(config.link, "link") if config.link is not None else None)
        unless_loaded.callback(device.close)
        extra = predictor.n_bytes if predictor is not None else 0
        opened = open_model(folder, config, device, progress, "half" if model is None else None, extra)
        unless_loaded.callback(opened.store.close)
        engine = Engine(*opened, device, Policy(config.policy), table)
        if predictor is not None:
            engine.predict(predictor)
        gc.collect()  # the meta models that planning made
        give_back()
        unless_loaded.pop_all()
        return engine


class Engine:
    """A loaded model. `.model` is a stock transformers model whose experts are ours; `.tokenizer` its tokenizer, or None."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        dtype: torch.dtype,
        trunk: str,
        device: Device,
        policy: Policy = Policy.DUOSERVE,
        kernels: Kernels | None = None,
    ):
        self.store, self.plan, self.dtype, self.trunk, self.device = store, plan, dtype, trunk, device
        loaded = load_model(store, read_config(store.folder), plan, dtype, device, trunk, policy, kernels)
        self.model, self.runtime, self._watch = loaded
        grouping = self.runtime.grouping
        if grouping is not None and grouping.why is not None:
            warnings.warn(f"the table of kernels is not used: {grouping.why}", stacklevel=3)
        self.tokenizer = read_tokenizer(store.folder)
        self._turn, self._turn_of = threading.Lock(), 0
        self._finalizer = weakref.finalize(self, _release, device, store)
        self._last: Answer | None = None
        self._trunk_bytes = trunk_bytes(self.model)  # it does not grow

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        visible: Collection[int] = (),
        **options: Any,
    ) -> Any:
        """Answer a text, or a list of chat messages ({"role", "content"}), with an `Answer`.

        `options` go to transformers' `generate` (max_new_tokens, do_sample, temperature, prompt_lookup_num_tokens, ...);
        unknown ones are refused. `on_text` receives the text piece by piece; `on_layer(done, all)` follows the reading of
        the prompt; `cancelled` is asked after every token, and after every layer of the prompt. Special tokens are no text,
        but for those that are `visible`.
        Called without a prompt, with `input_ids=`, this is `model.generate` itself and returns its tensor.
        """
        if isinstance(prompt, torch.Tensor):
            prompt, options = None, {"input_ids": prompt} | options
        if prompt is None:
            with torch.inference_mode(), self._taking_turn():
                return self.model.generate(**options)
        ids_1S = self.encode(prompt)
        limit = room(self.plan.ctx, ids_1S.shape[1], asked_tokens(options, ids_1S.shape[1]))
        meter = Meter(self._text_tokenizer(), on_text, visible)
        options = self._generation(options, meter, cancelled)
        with torch.inference_mode(), self._taking_turn(), self.runtime.following(on_layer, cancelled):
            meter.start()
            passes = self.runtime.steps
            try:
                out = self.model.generate(
                    input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S), max_new_tokens=limit, **options
                )
            except Cancelled:
                out = ids_1S
            except ValueError as error:
                if isinstance(error, Refusal) or self.runtime.steps > passes:
                    raise
                raise refused(error) from error  # transformers judges options before its first pass
        was_cancelled = bool(cancelled and cancelled())
        self._last = self._answer(meter, ids_1S.shape[1], out[0, ids_1S.shape[1] :], limit, was_cancelled)
        return self._last

    @contextlib.contextmanager
    def _taking_turn(self) -> Iterator[None]:
        """One answer at a time; others wait, but not whoever would wait for itself."""
        if self._turn_of == threading.get_ident():
            raise RuntimeError("the engine is answering on this thread: ask again once that answer is there")
        with self._turn:
            self._turn_of = threading.get_ident()
            try:
                yield
            finally:
                self._turn_of = 0

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The answer's text, piece by piece as it is made. Closing the iterator stops the generation."""
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        closed = threading.Event()

        def work() -> None:
            try:
                self.generate(prompt, on_text=pieces.put, cancelled=closed.is_set, **options)
                pieces.put(None)
            except BaseException as error:  # handed to the reader
                pieces.put(error)

        finished = in_background(work, "stream")
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            closed.set()
            finished()

    def encode(self, prompt: Prompt) -> torch.Tensor:
        """Token ids (1, S) of a text, or of messages through the model's chat template."""
        return encode(self._text_tokenizer(), prompt).to(self.device.torch_device)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        return ends(self.model.generation_config)

    def foresee(self, future: Future) -> None:
        """The passes from the next one on will choose so: for `policy="belady"`, which replays what was recorded."""
        if future.experts != (experts := tuple(layer.n_experts for layer in self.store.layers)):
            what = f"the future is of layers with {list(future.experts)} experts, the model has {list(experts)}"
            raise Refusal("E_OPTION", what, "record this model")
        self.runtime.foresee(future)

    def predict(self, predictor: Predictor | None, always: bool = False) -> None:
        """Let decode guess with `predictor` from the next pass on (None: with none). Tokens do not depend on it.

        Unless `always`, it is measured while it runs and used only while it pays; `stats()["prediction"]` has the figures.
        Refused for a predictor of another model.
        """
        theirs = predictor.fingerprint if predictor is not None else None
        if theirs is not None and theirs != self.store.fingerprint:
            raise Refusal(
                "E_PREDICTOR_MODEL",
                f"the predictor was trained for model {theirs}, this is {self.store.fingerprint}",
                "train one for this model, or say --predictor none",
            )
        self.runtime.predict(predictor, always)

    def record(self, timeline: Timeline | None) -> None:
        """Note what happens from the next pass on in `timeline`, until None is given. Tokens do not depend on it."""
        self.runtime.record(timeline)

    def routers(self) -> list[Router | None]:
        """The model's routers as plain values, one for each MoE layer; None where a family keeps them in another shape."""
        return routers_of(self.model, [layer.module for layer in self.store.layers])

    def about(self) -> dict[str, str]:
        """What runs here, in words: for whoever writes figures down."""
        plan = self.plan
        return {
            "model": self.store.folder.name,
            "policy": self.runtime.policy.value,
            "residency": f"{plan.slots} of {plan.experts} experts",
            "format": self.store.format,
            "device": self.device.name,
            "threads": str(torch.get_num_threads()),
        }

    def stats(self) -> dict[str, Any]:
        """Figures since loading: experts hit, in flight, missed; bytes; planned against used memory. Bytes and seconds."""
        counts = self.runtime.transfer.counts()
        copy, last = self.device.copy, self._last
        used = {
            "trunk_bytes": self._trunk_bytes,
            "predictor_bytes": self.runtime.ahead.n_bytes,
            "scratch_bytes": self.plan.scratch_bytes,
            "kv_bytes": self._watch.kv_peak_bytes,
            "slots_bytes": self.runtime.transfer.memory.numel(),
        }
        planned = {
            "trunk_bytes": self.plan.trunk_bytes,
            "predictor_bytes": self.plan.predictor_bytes,
            "scratch_bytes": self.plan.scratch_bytes,
            "kv_bytes": self.plan.kv_bytes,
            "slots_bytes": self.plan.slots * self.plan.slot_bytes,
        }
        return {
            "prompt_tokens": last.prompt_tokens if last else 0,
            "new_tokens": last.new_tokens if last else 0,
            "ttft_s": last.ttft_s if last else None,
            "decode_tok_s": last.decode_tok_s if last else None,
            "residency": self.plan.residency,
            "slots": self.plan.slots,
            "experts": self.plan.experts,
            "ctx": self.plan.ctx,
            "format": self.store.format,
            "trunk": self.trunk,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.name,
            "policy": self.runtime.policy.value,
            "threads": torch.get_num_threads(),
            "hits": counts.hits,
            "in_flight": counts.in_flight,
            "misses": counts.misses,
            "guesses": counts.guesses,
            "guesses_ready": counts.ready,
            "guesses_late": counts.late,
            "guesses_wrong": counts.wrong,
            "prediction": self.runtime.ahead.stats(),
            "evictions": self.runtime.cache.evictions,
            "bytes_moved": copy.cost_done,
            "link_busy_s": copy.busy_s,
            "link_gbps": copy.cost_done / copy.busy_s / 1e9 if copy.busy_s else None,
            "stall_s": dict(self.runtime.stalls),
            "kernels": self.runtime.grouping.stats() if self.runtime.grouping is not None else None,
            "budget_bytes": self.plan.budget_bytes,
            "planned_bytes": sum(planned.values()),
            "used_bytes": sum(used.values()),
            "planned": planned,
            "used": used,
            "steps": self.runtime.steps,
        }

    def close(self) -> None:
        """Stop the worker threads and close the store's files; what is asked of the model afterwards raises RuntimeError."""
        self.runtime.close()
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _text_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise Refusal(
                "E_TOKENIZER", f"{self.store.folder} has 0 tokenizer files", "pass input_ids, or add the tokenizer", 3
            )
        return self.tokenizer

    def _generation(
        self, options: dict[str, Any], meter: Meter, cancelled: Callable[[], bool] | None
    ) -> dict[str, Any]:
        """The user's options for transformers' generate, checked, with what we add to them."""
        check_options(options)
        added: dict[str, Any] = {"pad_token_id": padding(self.model.generation_config)}
        if (options.get("num_beams") or self.model.generation_config.num_beams or 1) == 1:
            added["streamer"] = meter  # beams have no text until the end
        if options.get("stop_strings") or self.model.generation_config.stop_strings:
            added["tokenizer"] = self.tokenizer
        if cancelled:
            stop = [*options.pop("stopping_criteria", []), Cancel(cancelled)]
            added["stopping_criteria"] = transformers.StoppingCriteriaList(stop)
        return added | options

    def _answer(self, meter: Meter, prompt_tokens: int, new_ids: torch.Tensor, limit: int, cancelled: bool) -> Answer:
        n = int(new_ids.shape[0])
        ended = n > 0 and int(new_ids[-1]) in self.ends
        text = meter.decoded(new_ids)
        finish = "stop" if ended else "cancelled" if cancelled else "length" if n >= limit else "stop"
        return Answer(text, prompt_tokens, n, meter.ttft_s, meter.rate(n), finish, new_ids.tolist())


def _release(device: Device, store: Store) -> None:
    device.close()
    store.close()


def trunk_bytes(model: Any) -> int:
    """Bytes of everything of the model that is resident: parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
