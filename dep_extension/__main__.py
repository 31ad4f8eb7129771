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
from duoserve.flags import (
    FiguresAsJson,
    MaxNewTokens,
    Model,
    Seed,
    System,
    Temperature,
    TopP,
    engine_options,
    parameter,
    spread,
)

INTERRUPTED, LEFT = 130, 8  # exit status
app = typer.Typer(
    name="dep_extension",
    help="Run a model with attention on some ranks and experts on others.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CUT = {
    "attention_ranks": Annotated[
        int | None, typer.Option(min=1, help="Ranks that attend. Default: the plan's, else 1.")
    ],
    "expert_ranks": Annotated[
        int | None, typer.Option(min=1, help="Ranks that hold experts. Default: the plan's, else the rest.")
    ],
    "plan": Annotated[Path | None, typer.Option("--plan", help="A plan that `duoserve dep plan --save` wrote.")],
    "r1": Annotated[
        int | None, typer.Option("--r1", min=1, max=4096, help="Micro-batches. Default: the plan's, else 2.")
    ],
    "r2": Annotated[
        int | None, typer.Option("--r2", min=1, max=4096, help="Chunks of one. Default: the plan's, else 1.")
    ],
    "order": Annotated[str | None, typer.Option("--order", help="ASAS or AASS. Default: the plan's, else ASAS.")],
    "replicas": Annotated[
        int | None, typer.Option(min=1, help="Expert ranks that hold each expert. Default: the plan's, else 1.")
    ],
}
Interface = Annotated[str | None, typer.Option(help="The network that ranks talk over, like eth0. Default: loopback.")]
_how_cut = spread("cut", [parameter(name, kind) for name, kind in _CUT.items()], dict)
_of_each_rank = engine_options(
    *("budget", "format", "trunk", "dtype", "device", "ctx", "cache_dir", "threads", "slots", "kernels"),
    budget="Memory of each rank: 6GiB; of its share's experts 50%, half or min.",
    trunk="Attention, shared experts and head as int4, nf4 or bf16.",
    threads="Threads of arithmetic of each rank.",
    slots="At most so many slots on each expert rank.",
    kernels="A table that `duoserve dep kernels` wrote here.",
)


@app.command()
@_how_cut
@_of_each_rank
def generate(
    model: Model = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Answer this; may be repeated.")] = None,
    system: System = None,
    cut: dict[str, Any],
    options: dict[str, Any],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    interface: Interface = None,
    as_json: FiguresAsJson = False,
) -> None:
    """Answer prompts, dealt to the attention ranks and their micro-batches; the first rank prints all answers."""
    from dep_extension import running
    from dep_extension.answering import Asked

    asked = Asked(tuple(prompt or ()), max_new_tokens, temperature, top_p, seed, system)
    found = running.answer(model, EngineConfig.of(**options), running.Cutting(**cut), interface, asked)
    if found is None:
        return
    for answer in found["answers"]:
        print(answer["text"] if len(asked.prompts) == 1 else f"[{answer['prompt'] + 1}] {answer['text']}", flush=True)
    if as_json:
        print(json.dumps(found), flush=True)


@app.command()
@_how_cut
@_of_each_rank
def bench(
    model: Model = None,
    *,
    samples: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make of each; 1: prefill alone.")] = 16,
    trials: Annotated[int, typer.Option(min=1, help="Runs, after one to warm up.")] = 3,
    cut: dict[str, Any],
    options: dict[str, Any],
    interface: Interface = None,
    as_json: FiguresAsJson = False,
) -> None:
    """Time random prompts: tokens per second, and the seconds in which rows travel and nobody computes."""
    from dep_extension import running
    from dep_extension.spans import Load

    load = Load(samples, prompt_tokens, new_tokens)
    found = running.time_it(model, EngineConfig.of(**options), running.Cutting(**cut), interface, load, trials)
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
