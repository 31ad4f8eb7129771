"""The commands that learn: `duoserve train` and `duoserve evaluate`. Puts traces and predictors together; knows options,
lines and tables. Imports torch late.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duoserve.core import Refusal
from duoserve.progress import Line

if TYPE_CHECKING:
    from predictor.evaluate import Entry, Report
    from traces.store import Traces

DEMO_PREDICTOR = Path(__file__).parent / "demo" / "predictor"
PHASES = ("all", "decode", "prefill")
Trace = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `duoserve trace` made.")]


def train(
    trace: Trace,
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the predictor.")],
    kind: Annotated[str, typer.Option(help="head, pre-attention, mlp, matching or popularity.")] = "head",
    epochs: Annotated[int | None, typer.Option(help="At most this many. Default: 6.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same predictor.")] = 0,
    split: Annotated[str, typer.Option(help="By prompt, or by token, which flatters.")] = "prompt",
    validation: Annotated[float, typer.Option(help="Share of the prompts that decides when to stop.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the prompts that nothing is learned from.")] = 0.1,
    lead: Annotated[int, typer.Option(help="Layers ahead that it guesses.")] = 1,
    units: Annotated[int, typer.Option(help="Hidden units of a head.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of prompts to learn from, about; 0 takes all.")] = 0,
) -> None:
    """Train a predictor of experts from a trace."""
    import torch  # noqa: F401  (before the rest: its libraries first)

    from predictor.load import KINDS, TENSORS, refuse_others, save_folder
    from predictor.train import Options
    from predictor.train import train as learn
    from traces.store import Traces

    if kind not in KINDS:
        raise Refusal("E_OPTION", f"no kind {kind!r}", f"kinds: {', '.join(KINDS)}")
    options = Options(
        kind, Options().epochs if epochs is None else epochs, seed, split, validation, test, lead, units, tokens
    )
    refuse_others(out)  # said before hours of learning
    predictor, training = learn(Traces(trace), options, _told())
    save_folder(out, kind, predictor, training)
    size = (out / TENSORS).stat().st_size
    print(f"{kind}: {predictor.n_params:,} parameters, {size:,} bytes, from {training.rows:,} tokens: {out}")
    for name, found in (("validation", training.validation), ("test", training.test)):
        by = f"held out by {split}"
        print(f"  {name}: slot recall {found['slot_recall']:.1%}, exact {found['exact']:.1%} ({by})")


SURE = 0.005  # share done from which a guess at the time left is worth saying


def _told() -> Callable[[str, float], None]:
    """Progress with the time left."""
    line = Line()

    def tell(what: str, share: float) -> None:
        left = f", {line.left(share)}" if SURE < share < 1 else ""
        line.say(f"{what}: {share:.0%}{left}", last=share >= 1)

    return tell


def evaluate(
    trace: Trace,
    predictors: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PREDICTOR", help="Folders that `duoserve train` made; the demo's and all untrained if left out."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per predictor, one a line.")] = False,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Slot recall of each layer, too.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw PNG pictures into this folder.")] = None,
    arrive: Annotated[
        int | None, typer.Option(help="Slabs that arrive in one layer's time. Default: as traced.")
    ] = None,
    phase: Annotated[str, typer.Option(help="Rows to look at: all, decode or prefill.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Look at this many prompts only.")] = None,
) -> None:
    """Score predictors on a trace: how many of the chosen experts they name, and what a call costs."""
    if phase not in PHASES:
        raise Refusal("E_OPTION", f"no phase {phase!r}", f"phases: {', '.join(PHASES)}")
    if arrive is not None and arrive < 1:
        raise Refusal("E_OPTION", f"{arrive} slabs arrive", "give at least 1")
    import torch  # noqa: F401

    from traces.store import Traces

    reports = _reports(Traces(trace), predictors or [], arrive, phase, limit)
    if plots is not None:
        from predictor.plots import draw

        for path in draw(reports, plots):
            print(f"drew {path}", file=sys.stderr)
    if as_json:
        for report in reports:
            print(json.dumps(report.to_json()))
        return
    _print_tables(reports, by_layer)


def _reports(
    traces: Traces, folders: Sequence[Path], arrive: int | None, phase: str, limit: int | None
) -> list[Report]:
    from predictor import evaluate as judge
    from predictor.train import shape_of

    shape = shape_of(traces)
    trained, seen = _trained(folders, shape.fingerprint or "")
    prompts, n_out = judge.left_out(traces.prompts, seen)
    prompts = prompts[:limit] if limit is not None else prompts
    if n_out:
        print(
            f"{n_out} of {len(traces.prompts)} prompts are left out: a predictor was trained on them", file=sys.stderr
        )
    if not prompts:
        what = f"all {len(traces.prompts)} prompts of {traces.folder} were trained on"
        raise Refusal("E_TRACE", what, "evaluate on a trace of other prompts")
    entries = [*trained, *judge.untrained(traces.routers(), shape, traces.about.hidden)]
    online: list[Entry] = [] if folders else judge.learning(shape)
    about = traces.about
    n = arrive if arrive is not None else judge.arrivals(about.layer_s, about.slab_s)
    request = judge.Request(traces.sequences, prompts, shape, n, phase)
    if not about.hidden:
        entries = [e for e in entries if not e.predictor.wants]
        print("the trace has no hidden states: what looks at them is left out", file=sys.stderr)
    return judge.evaluate([*entries, *online], request, [entry.predictor for entry in online])


def _trained(folders: Sequence[Path], fingerprint: str) -> tuple[list[Entry], set[str]]:
    """The predictors named, or the demo's where the trace is the demo's; and the prompts they were trained on."""
    from predictor.evaluate import Entry
    from predictor.load import check_model, load_folder

    entries: list[Entry] = []
    seen: set[str] = set()
    for folder in folders or ([DEMO_PREDICTOR] if DEMO_PREDICTOR.is_dir() else []):
        found = load_folder(folder)
        if not folders and found.predictor.fingerprint != fingerprint:
            print("the trace is of another model than the demo: its predictor is left out", file=sys.stderr)
            continue
        check_model(found.predictor, fingerprint)
        name = found.predictor.name if found.training.split == "prompt" else f"{found.predictor.name} (by token)"
        taken = {entry.name for entry in entries}
        entries.append(Entry(f"{name} [{folder.name}]" if name in taken else name, found.predictor,
                             frozenset(found.training.domains)))  # fmt: skip
        seen |= set(found.training.prompts)
    return entries, seen


def _print_tables(reports: Sequence[Report], by_layer: bool) -> None:
    first = reports[0]
    rows = max((first.at(layer).rows for layer in first.layers), default=0)
    k = first.shape.choices[-1]
    print(f"{rows:,} tokens a layer; k = {k}; {first.arrive} slab(s) arrive in one layer's time; means over `layers`\n")
    head = ["predictor", "slot recall", "exact", ">= half", "at k+2", "ready", "us/call", "params", "layers", "covers"]
    lines = []
    for report in reports:
        found = report.figures(report.compared)
        shares = [f"{100 * found[name]:.1f}" for name in ("slot_recall", "exact", "half", "recall_k2", "ready")]
        cost = [f"{report.us_per_call:.0f}", f"{report.entry.predictor.n_params:,}"]
        lines.append([report.name, *shares, *cost, _span(report.compared), _span(report.layers)])
    _print_table(head, lines)
    if by_layer:
        layers = range(len(first.shape.experts))
        print("\nslot recall by layer\n")
        at = {r.name: [_share(r, layer) for layer in layers] for r in reports}
        _print_table(["predictor", *map(str, layers)], [[name, *shares] for name, shares in at.items()])
    domains = sorted({domain for r in reports for domain in r.domains()})
    if len(domains) > 1:
        print("\nslot recall by domain; * = not among those the predictor was trained on\n")
        _print_table(["predictor", *domains], [[r.name, *(_of_domain(r, d) for d in domains)] for r in reports])


def _share(report: Report, layer: int) -> str:
    if layer not in report.layers:
        return "-"
    return f"{100 * report.at(layer).figures(report.shape.choices[layer], report.arrive)['slot_recall']:.1f}"


def _of_domain(report: Report, domain: str) -> str:
    mark = "*" if report.trained_on(domain) is False else ""
    return f"{100 * report.figures(report.compared, [domain])['slot_recall']:.1f}{mark}"


def _span(layers: Sequence[int]) -> str:
    """[1, 2, 3, 5] as 1-3,5."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts) or "-"


def _print_table(head: list[str], lines: list[list[Any]]) -> None:
    """Plain text, in the manner of Markdown: also readable where it is pasted."""
    rows = [head, *lines]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]

    def line(row: Sequence[Any]) -> str:
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    print(line(head))
    print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    for row in lines:
        print(line(row))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    app.command()(evaluate)
