"""The commands of a disaggregated run, one process per rank: `torchrun --nproc-per-node N -m dep_extension generate ...`.
Puts ranks, plans and prompts together and turns refusals into one line; imports torch late.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from duoserve.config import EngineConfig
from duoserve.core import Refusal

INTERRUPTED, LEFT = 130, 8  # exit status
app = typer.Typer(
    name="dep_extension",
    help="Run a model with attention on some ranks and experts on others.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Argument(help="Hub id, checkpoint folder or expert store; the bundled demo if left out.")
]
AttentionRanks = Annotated[int | None, typer.Option(min=1, help="Ranks that attend. Default: the plan's, else 1.")]
ExpertRanks = Annotated[
    int | None, typer.Option(min=1, help="Ranks that hold experts. Default: the plan's, else the rest.")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A plan that `duoserve dep plan --save` wrote.")]
R1 = Annotated[int | None, typer.Option("--r1", min=1, max=4096, help="Micro-batches. Default: the plan's, else 2.")]
R2 = Annotated[int | None, typer.Option("--r2", min=1, max=4096, help="Chunks of one. Default: the plan's, else 1.")]
OrderName = Annotated[str | None, typer.Option("--order", help="ASAS or AASS. Default: the plan's, else ASAS.")]
Replicas = Annotated[
    int | None, typer.Option(min=1, help="Expert ranks that hold each expert. Default: the plan's, else 1.")
]
KernelTable = Annotated[Path | None, typer.Option("--kernels", help="A table that `duoserve dep kernels` wrote here.")]
Budget = Annotated[str | None, typer.Option(help="Memory of each rank: 6GiB; of its share's experts 50%, half or min.")]
Format = Annotated[str | None, typer.Option(help="Experts as int4 (default), nf4 or bf16.")]
Trunk = Annotated[str | None, typer.Option(help="Attention, shared experts and head as int4, nf4 or bf16.")]
Dtype = Annotated[str | None, typer.Option(help="Arithmetic and trunk: bfloat16, float32 or float16.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Ctx = Annotated[str | None, typer.Option(help="Tokens of context to plan for, such as 4096 or 32k.")]
Slots = Annotated[str | None, typer.Option(help="At most so many slots on each expert rank.")]
Threads = Annotated[int | None, typer.Option(help="Threads of arithmetic of each rank.")]
CacheDir = Annotated[str | None, typer.Option(help="Where converted stores are kept.")]
Interface = Annotated[str | None, typer.Option(help="The network that ranks talk over, like eth0. Default: loopback.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures as the last line.")]


@app.command()
def generate(
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Answer this; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    attention_ranks: AttentionRanks = None,
    expert_ranks: ExpertRanks = None,
    plan: PlanFile = None,
    r1: R1 = None,
    r2: R2 = None,
    order: OrderName = None,
    replicas: Replicas = None,
    budget: Budget = None,
    format: Format = None,
    trunk: Trunk = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    ctx: Ctx = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens per answer.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share of the probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    slots: Slots = None,
    kernels: KernelTable = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    interface: Interface = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts, dealt to the attention ranks and their micro-batches; the first rank prints all answers."""
    options: dict[str, Any] = {"budget": budget, "format": format, "trunk": trunk, "dtype": dtype, "device": device}
    options |= {"ctx": ctx, "slots": slots, "threads": threads, "cache_dir": cache_dir}
    options["kernels"] = str(kernels) if kernels is not None else None
    config = EngineConfig.of(**options)
    from dep_extension import running
    from dep_extension.answering import Asked

    asked = Asked(tuple(prompt or ()), max_new_tokens, temperature, top_p, seed, system)
    cut = running.Cutting(attention_ranks, expert_ranks, plan, r1, r2, order, replicas)
    found = running.answer(model, config, cut, interface, asked)
    if found is None:
        return
    for answer in found["answers"]:
        print(answer["text"] if len(asked.prompts) == 1 else f"[{answer['prompt'] + 1}] {answer['text']}", flush=True)
    if as_json:
        print(json.dumps(found), flush=True)


@app.command()
def bench(
    model: Model = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make of each; 1: prefill alone.")] = 16,
    trials: Annotated[int, typer.Option(min=1, help="Runs, after one to warm up.")] = 3,
    attention_ranks: AttentionRanks = None,
    expert_ranks: ExpertRanks = None,
    plan: PlanFile = None,
    r1: R1 = None,
    r2: R2 = None,
    order: OrderName = None,
    replicas: Replicas = None,
    budget: Budget = None,
    format: Format = None,
    trunk: Trunk = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    ctx: Ctx = None,
    slots: Slots = None,
    kernels: KernelTable = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    interface: Interface = None,
    as_json: AsJson = False,
) -> None:
    """Time random prompts: tokens per second, and the seconds in which rows travel and nobody computes."""
    options: dict[str, Any] = {"budget": budget, "format": format, "trunk": trunk, "dtype": dtype, "device": device}
    options |= {"ctx": ctx, "slots": slots, "threads": threads, "cache_dir": cache_dir}
    options["kernels"] = str(kernels) if kernels is not None else None
    config = EngineConfig.of(**options)
    from dep_extension import running
    from dep_extension.spans import Load

    cut = running.Cutting(attention_ranks, expert_ranks, plan, r1, r2, order, replicas)
    found = running.time_it(model, config, cut, interface, Load(samples, prompt_tokens, new_tokens), trials)
    if found is None:
        return
    if as_json:
        print(json.dumps(found), flush=True)
        return
    if found["seconds"] is None:
        print("no run without a loss")
        return
    print(f"{found['tokens_per_s']:.1f} tokens/s, {found['seconds']:.3f} s, exposed {found['exposed_s']:.3f} s")


def main() -> None:
    """Entry point. Exit codes as `Refusal.status`; each machine's first rank says what was wrong."""
    if sys.argv[1:2] == ["launch"]:
        from dep_extension.launch import launch

        sys.exit(_guarded(lambda: launch(sys.argv[2:])))
    sys.exit(_guarded(lambda: app(standalone_mode=False)))


def _guarded(run: Callable[[], Any]) -> int:
    try:
        return int(run() or 0)
    except Refusal as refusal:
        return _say(str(refusal), refusal.status)
    except ValueError as error:  # of what knows no refusals: worlds, plans
        return _say(f"E_OPTION: {error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        if type(error).__name__ in ("PeerLost", "Fenced"):  # torch is imported only where it is needed
            return _say(f"E_LOST: {error}; start it again", LEFT)
        if hasattr(error, "format_message"):  # typer's own, of a command line that cannot be read
            return _say(f"E_USAGE: {' '.join(error.format_message().split())} Try --help.", 2)
        raise


def _say(line: str, status: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0" or status == LEFT:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
