"""The commands `trace` and `trace-stats`: prompts run through an engine while traces.record watches, and what a trace says.
Knows the command line and how prompts are run; knows nothing of Parquet, figures or pictures. Imports torch late.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from duoserve import flags
from duoserve.columns import aligned
from duoserve.core import Phase, Refusal, Step
from duoserve.flags import engine_options
from duoserve.progress import Line, shown
from duoserve.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    import torch

    from duoserve.engine import Engine
    from traces.record import Recorder

INTERRUPTED = 130


@engine_options("budget", "format", "trunk", "dtype", "device", "ctx", "cache_dir", "threads")
def trace(
    model: flags.Model = None,
    *,
    prompts: Annotated[Path, typer.Option("--prompts", help="A .jsonl, .txt or .md file, or a folder of them.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the trace.")],
    hidden: Annotated[bool, typer.Option("--hidden", help="Also what routers and layers read, as float16.")] = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens are made for each prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling, which is the model's own.")] = 0,
    limit_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer prompts to this many tokens; else they are refused.")
    ] = None,
    options: dict[str, Any],
) -> None:
    """Run prompts and record what the model's routers decide, as Parquet, for `duoserve train` and `trace-stats`."""
    found = read_prompts(prompts)
    from traces.store import refuse_full

    refuse_full(out)
    from duoserve.engine import load

    with shown() as progress:
        opened = load(model, progress=progress, **options)
    with opened as engine:
        run = Run(new_tokens, batch, seed, limit_tokens, hidden)
        whole, written = record(engine, found, out, run, _progress())
    print(written)
    if not whole:
        raise typer.Exit(INTERRUPTED)


class Run(NamedTuple):
    """How prompts are run."""

    new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    limit_tokens: int | None = None
    hidden: bool = False


def record(engine: Engine, prompts: list[Prompt], out: Path, run: Run, progress: Any = None) -> tuple[bool, str]:
    """Run all prompts into a new trace. Whether all of them ran (Ctrl-C ends it), and one line on what was written."""
    from traces.record import Recorder, about

    batches = _batches(engine, prompts, run)
    layers = engine.store.layers
    known = about(
        engine.store.fingerprint, engine.dtype, [layer.n_experts for layer in layers], _choices(engine, batches[0]),
        hidden=run.hidden, residency=engine.plan.residency,
        options=run._asdict() | {"format": engine.store.format, "trunk": engine.trunk},
    )  # fmt: skip
    recorder = Recorder(out, known, engine.routers(), engine.ends)
    clock = _Clock()
    before = engine.stats()
    hook = engine.model.register_forward_pre_hook(clock.begin)
    engine.runtime.observers += [clock, recorder]
    try:
        whole = _run(engine, batches, recorder, run, progress or (lambda *a: None))
    finally:
        hook.remove()
        engine.runtime.observers.remove(recorder)
        engine.runtime.observers.remove(clock)
        recorder.close(clock.layer_s(len(layers)), _slab_s(before, engine))
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    what = f"{recorder.sequences} of {len(prompts)} prompts, {recorder.rows:,} rows, {n_bytes / 1e6:,.1f} MB"
    return whole, f"{out}: {what}{'' if whole else '; interrupted, what is written is whole'}"


def _run(engine: Engine, batches: list[_Batch], recorder: Recorder, run: Run, progress: Any) -> bool:
    import torch

    done, total = 0, sum(len(b.prompts) for b in batches)
    try:
        for number, batch in enumerate(batches):
            for prompt in batch.prompts:
                recorder.expect(prompt.id, prompt.domain)
            torch.manual_seed(run.seed + number)
            engine.generate(
                input_ids=batch.ids_BS, attention_mask=batch.mask_BS, max_new_tokens=batch.new_tokens,
                pad_token_id=batch.pad,
            )  # fmt: skip
            done += len(batch.prompts)
            progress(done, total, recorder.rows)
    except KeyboardInterrupt:
        return False
    return True


class _Batch(NamedTuple):
    prompts: list[Prompt]
    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    new_tokens: int
    pad: int


def _batches(engine: Engine, prompts: list[Prompt], run: Run) -> list[_Batch]:
    """All prompts as tokens, padded on the left; refused here, before any has run."""
    from duoserve.answer import padding

    encoded = [_encoded(engine, prompt, run.limit_tokens) for prompt in prompts]
    pad = padding(engine.model.generation_config) or 0
    found = []
    for at in range(0, len(prompts), run.batch):
        rows = encoded[at : at + run.batch]
        ids, mask = _padded(rows, pad)
        new = min(run.new_tokens, engine.plan.ctx - ids.shape[1])
        if not engine.plan.holds(len(rows), ids.shape[1] + new):
            what = f"{len(rows)} prompts of up to {ids.shape[1]} tokens with {new} new ones do not fit the context"
            raise Refusal("E_CTX", f"{what} of {engine.plan.ctx}", "lower --batch, or raise --ctx", 4)
        found.append(_Batch(prompts[at : at + run.batch], ids, mask, new, pad))
    return found


def _padded(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.arange(longest, device=row.device) >= longest - len(row) for row in rows]).long()
    return ids, mask


def _encoded(engine: Engine, prompt: Prompt, limit: int | None) -> torch.Tensor:
    ids = engine.encode(prompt.content)[0][:limit]
    if len(ids) >= engine.plan.ctx:
        what = f"prompt {prompt.id!r} has {len(ids)} tokens, the context {engine.plan.ctx}"
        raise Refusal("E_CTX", what, "cut prompts with --limit-tokens, or raise --ctx", 4)
    return ids


def _choices(engine: Engine, batch: _Batch) -> list[int]:
    """How many experts each layer's router chooses, as it does for one token."""
    import torch

    seen: list[Step] = []

    def note(step: Step) -> None:
        seen.append(step)

    engine.runtime.observers.append(note)
    try:
        with torch.inference_mode():
            engine.model(batch.ids_BS[:1, -1:], use_cache=False)
    finally:
        engine.runtime.observers.remove(note)
    return [int(route.ids_TK.shape[-1]) for route in seen[0].routes]


class _Clock:
    """Seconds of each decode pass."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def begin(self, module: Any, args: Any) -> None:
        self._began = time.perf_counter()

    def __call__(self, step: Step) -> None:
        if step.phase is Phase.DECODE:
            self._seconds.append(time.perf_counter() - self._began)

    def layer_s(self, layers: int) -> float | None:
        return statistics.median(self._seconds) / layers if self._seconds else None


def _slab_s(before: dict[str, Any], engine: Engine) -> float | None:
    """Seconds that the link was busy for each slab, since `before`."""
    after = engine.stats()
    slabs = (after["bytes_moved"] - before["bytes_moved"]) / engine.plan.slot_bytes
    return (after["link_busy_s"] - before["link_busy_s"]) / slabs if slabs else None


def _progress() -> Callable[[int, int, int], None]:
    """Of running prompts."""
    line = Line()

    def say(done: int, total: int, rows: int) -> None:
        line.say(f"{done} of {total} prompts, {rows:,} rows written, {line.left(done / total)}", last=done == total)

    return say


def trace_stats(
    folder: Annotated[Path, typer.Argument(help="A folder that `duoserve trace` made.")],
    as_json: flags.AsJson = False,
    plots: Annotated[Path | None, typer.Option("--plots", help="A folder for pictures (PNG).")] = None,
) -> None:
    """What a trace says of a model's routers: popularity, affinity, entropy, reuse, repetition, and what LRU would hit."""
    from traces import stats
    from traces.store import Traces

    traces = Traces(folder)
    found = stats.measure(traces)
    if plots is not None:
        from traces.plots import draw

        for path in draw(found, plots):
            print(path, file=sys.stderr)
    if as_json:
        print(json.dumps(stats.to_json(found)))
        return
    for line in aligned(stats.table(found)):
        print(line)


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command("trace")(trace)
    app.command("trace-stats")(trace_stats)
