"""The commands `dep calibrate` and `dep costs`: the costs of this machine, measured into a file that `dep plan --machine`
reads, and what such a file says. Knows the command line: measuring is `dep_extension`'s. Other commands of `dep` simulate;
`calibrate` times what is here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve import flags
from duoserve.config import size
from duoserve.core import Refusal

if TYPE_CHECKING:
    from dep_extension.calibrate import Calibration

LOCAL = 4  # experts of a rank that are timed at most: a line needs no more


def calibrate(
    out: Annotated[Path, typer.Argument(help="The file to write, as for `duoserve dep plan --machine FILE`.")],
    splits: Annotated[str, typer.Option(help="Attention and expert ranks, several with commas.")] = "1:1",
    device: Annotated[str, typer.Option(help="cpu (a process a rank, Gloo) or cuda (a GPU a rank, NCCL).")] = "cpu",
    model: Annotated[str | None, typer.Option(help="Shapes of this model. Default: small ones.")] = None,
    longest: Annotated[float | None, typer.Option(help="Seconds of a line's longest run.")] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Time products, attention and exchanges here, fit lines, say how straight they are. Under 2 minutes."""
    from dep_extension.calibrate import measure, save, split_of

    flags.check_targets(out)
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


def costs(
    machine: Annotated[str, typer.Argument(help="A calibrated file, or A, B, C, D: FinDEP's.")],
    here: Annotated[bool, typer.Option("--here", help="Refuse what was not measured on this machine.")] = False,
) -> None:
    """The lines of a machine, how straight they are, and where they are from."""
    from dep_extension import testbeds
    from dep_extension.calibrate import Calibration, named_here, read

    path = Path(machine)
    if machine in testbeds.names() and not here:
        found = Calibration(testbeds.named(machine), {})
    elif not path.is_file():
        raise Refusal("E_PROFILE", f"there is no machine's file {machine[:80]}", "calibrate one, or name one", 3)
    else:
        try:
            found = read(path, named_here() if here else None)
        except ValueError as error:
            what, _, remedy = str(error).rpartition(": ")
            raise Refusal("E_PROFILE", what, remedy, 5) from error
    for what, says in _rows(found):
        print(f"{what:12s}{says}".rstrip())


def _rows(found: Calibration) -> Iterator[tuple[str, str]]:
    machine = found.machine
    yield "machine", f"{machine.name}; {machine.gpus} ranks of {size(machine.memory_bytes)}"
    yield "from", machine.source
    lines = {"gemm": machine.gemm, "attention": machine.attention}
    lines |= {} if machine.experts is None else {"experts": machine.experts}
    lines |= {f"link {split.ag}:{split.eg}": line for split, line in sorted(machine.links.items())}
    for what, (a, b) in lines.items():
        straight = f"   R^2 {found.r2[what]:.6f}" if what in found.r2 else ""
        yield what, f"{a * 1e3:10.4f} ms + {b * 1e9:.4g} ns x{straight}"
    yield "counts", f"{machine.count_s * 1e3:10.4f} ms"
    yield "both ways", f"exchanges take {machine.both_ways:.2f} of their time alone while as much goes the other way"
    yield "beside", f"products beside an exchange take {machine.overlap:.2f} of their time alone"


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
