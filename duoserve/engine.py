"""Load a model and answer with it. Knows prompts, text, sampling and figures; knows nothing of slots or files."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
import transformers

from duoserve.checkpoint import check_config, quiet, read_config
from duoserve.config import EngineConfig, parse_size
from duoserve.convert import Conversion, Progress, write_store
from duoserve.core import Kernels, Policy, Predictor, Refusal, nearest
from duoserve.device import Device, in_background, open_device
from duoserve.future import Future
from duoserve.hub import resolve
from duoserve.manifest import is_store
from duoserve.model import load_model
from duoserve.moe import Cancelled
from duoserve.plan import Plan, check_memory, compute_dtype, default_budget, make_plan, trunk_format
from duoserve.routers import Router, routers_of
from duoserve.shelf import cache_dir, note_use, refuse_half_made
from duoserve.sizing import CACHE
from duoserve.store import Store
from duoserve.system import give_back, use_threads
from duoserve.timeline import Timeline

DEMO = Path(__file__).parent / "demo"
DEFAULT_NEW_TOKENS = 512

_OBJECTS = {"logits_processor", "stopping_criteria", "generation_config", "assistant_model", "past_key_values", CACHE}
Prompt = str | Sequence[dict[str, str]]
__all__ = ["Answer", "Engine", "load"]


@dataclass(frozen=True)
class Answer:
    """What came back, and how long it took. `finish` is "stop", "length" or "cancelled".

    `ttft_s`: seconds from the call to the first token. `decode_tok_s`: tokens after the first, per second; None where
    there was only one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tok_s: float | None
    finish: str
    token_ids: list[int] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.text


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
        opened = _opened(folder, config, device, progress, "half" if model is None else None, extra)
        unless_loaded.callback(opened.store.close)
        engine = Engine(*opened, device, Policy(config.policy), table)
        if predictor is not None:
            engine.predict(predictor)
        gc.collect()  # the meta models that planning made
        give_back()
        unless_loaded.pop_all()
        return engine


class _Opened(NamedTuple):
    store: Store
    plan: Plan
    dtype: torch.dtype
    trunk: str  # format of the trunk's linears


def _opened(
    folder: Path,
    config: EngineConfig,
    device: Device,
    progress: Progress | None,
    default: str | None,
    predictor_bytes: int,
) -> _Opened:
    """The store behind MODEL, converted if need be, but not before its plan is known to fit."""
    if is_store(folder):
        store = Store(folder)
        note_use(folder)
        try:
            return _planned(store, config, device, default, predictor_bytes)
        except BaseException:
            store.close()
            raise
    refuse_half_made(folder)
    format = config.format or ("bf16" if config.dtype == "float32" else "int4")
    conversion = Conversion.of(folder, format, config.dtype)
    dtype = compute_dtype(config.dtype, str(conversion.checkpoint.dtype).removeprefix("torch."))
    read_tokenizer(folder)  # refuse before an hour of converting
    trunk = trunk_format(config, format, dtype, device.name)
    free, model_config = _free(device), conversion.checkpoint.config
    plan = make_plan(conversion.size, model_config, dtype, config, free, default, trunk, predictor_bytes)
    _check_memory(plan, device)
    store = write_store(conversion, cache_dir(config.cache_dir) / conversion.name, progress)
    note_use(store.folder)
    return _Opened(store, plan, dtype, trunk)


def _planned(store: Store, config: EngineConfig, device: Device, default: str | None, predictor_bytes: int) -> _Opened:
    if config.format not in (None, store.format):
        raise Refusal("E_FORMAT", f"the store is {store.format}, asked was {config.format}", "convert the checkpoint")
    if config.dtype == "float32" == store.dtype and store.layouts[0].plain != "float32":
        warnings.warn(
            "the store rounded a float32 checkpoint to bfloat16; `duoserve convert --dtype float32` keeps it exact",
            stacklevel=4,
        )
    dtype = compute_dtype(config.dtype, store.dtype)
    trunk = trunk_format(config, store.format, dtype, device.name)
    free, model_config = _free(device), read_config(store.folder)
    plan = make_plan(store.size, model_config, dtype, config, free, default, trunk, predictor_bytes)
    _check_memory(plan, device)
    return _Opened(store, plan, dtype, trunk)


def _check_memory(plan: Plan, device: Device) -> None:
    check_memory(plan, device.free_bytes())


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
        **options: Any,
    ) -> Any:
        """Answer a text, or a list of chat messages ({"role", "content"}), with an `Answer`.

        `options` go to transformers' `generate` (max_new_tokens, do_sample, temperature, prompt_lookup_num_tokens, ...);
        unknown ones are refused. `on_text` receives the text piece by piece; `on_layer(done, all)` follows the reading of
        the prompt; `cancelled` is asked after every token, and after every layer of the prompt.
        Called without a prompt, with `input_ids=`, this is `model.generate` itself and returns its tensor.
        """
        if isinstance(prompt, torch.Tensor):
            prompt, options = None, {"input_ids": prompt} | options
        if prompt is None:
            with torch.inference_mode(), self._taking_turn():
                return self.model.generate(**options)
        ids_1S = self.encode(prompt)
        limit = self._room(ids_1S.shape[1], _asked(options, ids_1S.shape[1]))
        meter = _Meter(self._text_tokenizer(), on_text)
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
                raise _refused(error) from error  # transformers judges options before its first pass
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
        tokenizer = self._text_tokenizer()
        if isinstance(prompt, str):
            ids = tokenizer(prompt.encode(errors="replace").decode(), return_tensors="pt")["input_ids"]
        else:
            ids = self._templated(tokenizer, list(prompt))
        if ids.shape[1] == 0:
            raise Refusal("E_PROMPT", "the prompt has 0 tokens", "write at least one word")
        return ids.to(self.device.torch_device)

    def _templated(self, tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
        if not tokenizer.chat_template:
            raise Refusal("E_TEMPLATE", "the model has 0 chat templates", "pass a text instead of messages")
        if not messages or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            raise Refusal(
                "E_TEMPLATE", f"{len(messages)} messages, or some that are none", 'pass {"role": ..., "content": ...}'
            )
        clean = [m | {"content": m["content"].encode(errors="replace").decode()} for m in messages]
        try:
            encoded = tokenizer.apply_chat_template(
                clean, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates are programs of their authors
            raise Refusal(
                "E_TEMPLATE", f"the chat template refused {len(clean)} messages ({error})", "check the roles"
            ) from error
        return encoded["input_ids"]

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

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        """How many tokens may be made: as many as asked, or as fit."""
        room = self.plan.ctx - prompt_tokens
        if room < 1:
            raise Refusal(
                "E_CTX",
                f"the prompt has {prompt_tokens} tokens, the context {self.plan.ctx}",
                "shorten it, or load with a larger --ctx",
                4,
            )
        if asked is not None and asked < 1:
            raise Refusal("E_OPTION", f"max_new_tokens={asked} leaves nothing to answer with", "ask for at least 1")
        return min(room, DEFAULT_NEW_TOKENS if asked is None else asked)

    def _generation(
        self, options: dict[str, Any], meter: _Meter, cancelled: Callable[[], bool] | None
    ) -> dict[str, Any]:
        """The user's options for transformers' generate, checked, with what we add to them."""
        _check_options(options)
        added: dict[str, Any] = {"pad_token_id": self._pad()}
        if (options.get("num_beams") or self.model.generation_config.num_beams or 1) == 1:
            added["streamer"] = meter  # beams have no text until the end
        if options.get("stop_strings") or self.model.generation_config.stop_strings:
            added["tokenizer"] = self.tokenizer
        if cancelled:
            stop = [*options.pop("stopping_criteria", []), _Cancel(cancelled)]
            added["stopping_criteria"] = transformers.StoppingCriteriaList(stop)
        return added | options

    def _pad(self) -> int | None:
        config = self.model.generation_config
        if config.pad_token_id is not None:
            return int(config.pad_token_id)
        eos = config.eos_token_id
        return eos[0] if isinstance(eos, list) else eos

    def _answer(self, meter: _Meter, prompt_tokens: int, new_ids: torch.Tensor, limit: int, cancelled: bool) -> Answer:
        n = int(new_ids.shape[0])
        eos = self.model.generation_config.eos_token_id
        ended = n > 0 and int(new_ids[-1]) in ((eos if isinstance(eos, list) else [eos]) if eos is not None else [])
        text = self._text_tokenizer().decode(new_ids, skip_special_tokens=True)
        finish = "stop" if ended else "cancelled" if cancelled else "length" if n >= limit else "stop"
        return Answer(text, prompt_tokens, n, meter.ttft_s, meter.rate(n), finish, new_ids.tolist())


def _release(device: Device, store: Store) -> None:
    device.close()
    store.close()


def trunk_bytes(model: Any) -> int:
    """Bytes of everything of the model that is resident: parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class _Meter(transformers.TextStreamer):
    """Passes text on as it becomes whole words or lines, and notes when tokens came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._began = self._first = self._latest = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._latest = time.perf_counter()
            self._first = self._first or self._latest
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text and text:
            self._on_text(text)

    @property
    def ttft_s(self) -> float:
        return self._first - self._began if self._first else 0.0

    def rate(self, n: int) -> float | None:
        return (n - 1) / (self._latest - self._first) if n > 1 and self._latest > self._first else None


class _Cancel(transformers.StoppingCriteria):
    def __init__(self, cancelled: Callable[[], bool]):
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled(), dtype=torch.bool, device=input_ids.device)


def _asked(options: dict[str, Any], prompt_tokens: int) -> int | None:
    """New tokens asked for, in whichever of transformers' ways; None where nothing was said."""
    config = options.get("generation_config")
    asked = options.pop("max_new_tokens", None)
    if asked is None and options.get("max_length") is not None:
        asked = max(0, options.pop("max_length") - prompt_tokens)
    if asked is None and config is not None:
        asked = config.max_new_tokens
    return asked


def _refused(error: ValueError) -> Refusal:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
    what = f"transformers refuses these generation options ({reason})"
    return Refusal("E_OPTION", what, "correct the option, or the checkpoint's generation_config.json")


def _check_options(options: dict[str, Any]) -> None:
    known = {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")} | _OBJECTS
    for name in options:
        if name not in known:
            raise Refusal("E_OPTION", f"unknown generation option {name!r}", nearest(name, sorted(known)))
    if options.get("num_return_sequences", 1) != 1:
        n = options["num_return_sequences"]
        raise Refusal(
            "E_OPTION", f"num_return_sequences={n}, an Answer holds 1", "call generate(input_ids=...) for tensors"
        )
    if options.get("return_dict_in_generate"):
        raise Refusal(
            "E_OPTION", "an Answer holds 0 scores", "call generate(input_ids=...) for transformers' own output"
        )


def read_tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise Refusal(
            "E_TOKENIZER", f"{folder} has a tokenizer that cannot be read ({reason})", "fetch it again", 5
        ) from error


def _free(device: Device) -> int:
    return default_budget(device.name, device.free_bytes())
