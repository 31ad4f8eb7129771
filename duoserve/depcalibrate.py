"""The command `dep calibrate`: the costs of this machine, measured into a file that `dep plan --machine FILE` reads. Knows
the command line: measuring is `dep_extension`'s. Other commands of `dep` simulate; this one times what is here.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from duoserve.core import Refusal

LOCAL = 4  # experts of a rank that are timed at most: a line needs no more


def calibrate(
    out: Annotated[Path, typer.Argument(help="The file to write, as for `duoserve dep plan --machine FILE`.")],
    splits: Annotated[str, typer.Option(help="Attention and expert ranks, several with commas.")] = "1:1",
    device: Annotated[str, typer.Option(help="cpu (a process a rank, Gloo) or cuda (a GPU a rank, NCCL).")] = "cpu",
    model: Annotated[str | None, typer.Option(help="Shapes of this model. Default: small ones.")] = None,
    longest: Annotated[float | None, typer.Option(help="Seconds of a line's longest run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time products, attention and exchanges here, fit lines, say how straight they are. Under 2 minutes."""
    from dep_extension.calibrate import measure, save, split_of

    if not out.absolute().parent.is_dir():
        raise Refusal("E_IO", f"{out.parent} is no folder", "give a file in one that is there")
    try:
        asked = [split_of(word) for word in splits.split(",")]
        sizes = _sizes(model, max(split.eg for split in asked)) | ({} if longest is None else {"longest_s": longest})
        found = measure(asked, device, (lambda line: None) if as_json else _say, **sizes)
    except Refusal:
        raise
    except ValueError as error:
        what, _, remedy = str(error).rpartition(": ")
        if "device" in what:
            raise Refusal("E_DEVICE", what, remedy, 7) from error
        raise Refusal("E_OPTION", what, remedy) from error
    except RuntimeError as error:
        raise Refusal("E_DEVICE", str(error), "free memory, or ask for fewer ranks", 7) from error
    save(found.machine, out, found.r2)
    if as_json:
        links = [[*split, *line] for split, line in found.machine.links.items()]
        shown = asdict(found.machine) | {"links": links, "r2": dict(found.r2), "seconds": found.seconds}
        print(json.dumps(shown))
    else:
        print(f"{out}: {found.machine.name}")


def _say(line: str) -> None:
    print(line, flush=True)


def _sizes(model: str | None, ranks: int) -> dict[str, Any]:
    if model is None:
        return {}
    from duoserve.depsubject import known_model

    shape = known_model(model, "A")
    return {
        "hidden": shape.hidden,
        "expert_hidden": shape.expert_hidden,
        "experts": min(LOCAL, -(-shape.experts // ranks)),
        "heads": shape.heads,
        "head_dim": (shape.d_k + shape.d_v) // 2,
    }
