"""When what pays, simulated: decode by residency, link and model on one machine, the best policy of each cell and its gain
over the next. No GPU is here: every figure is of the clock (`duoserve.simulate`), none is measured.

python -m benchmarks.whatpays [--machine rtx5090] [--launch fused|stock] [--models NAME ...]

Sequences with published habits (`traces/generate.py`): a long prompt of another document fills the pool, then a prompt
is read and tokens are decoded, of which the second half counts. Writes results/whatpays.md, results/whatpays.jsonl and
docs/plots/whatpays.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.headline import LAUNCH
from benchmarks.machine import describe
from duoserve.core import Policy
from duoserve.fleet import machine
from duoserve.profile import Profile
from duoserve.simulate import Pass
from duoserve.simulating import Scene, generated, split
from duoserve.specimens import needs_of

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-120b")
FORMATS = {"qwen3-30b-a3b": "int4"}  # four bits everywhere, as the program would run them
RESIDENCIES = (0.125, 0.25, 0.5, 0.75)
LINKS = (6e9, 12e9, 25e9, 55e9)  # PCIe 3.0 x8, 3.0 x16, 4.0 x16, 5.0 x16
FILLING, PROMPT, TOKENS = 384, 64, 24  # rows of the document before, of the prompt, tokens that are decoded
TIE = 0.02  # gains below this are none


class Way(NamedTuple):
    policy: Policy
    recall: float | None
    colour: str


WAYS = {
    "strong on-demand (LRU)": Way(Policy.LRU, None, "#5b8db8"),
    "kept by worth": Way(Policy.DUOSERVE, None, "#4b9b6e"),
    "worth, guesses at 88 %": Way(Policy.DUOSERVE, 0.88, "#c8553d"),  # recall of a stale gate, as published for Qwen3
    "DuoServe as published, 88 %": Way(Policy.PAPER, 0.88, "#8e5ea2"),
}
BETTER = {
    "worth, guesses at 95 %": Way(Policy.DUOSERVE, 0.95, "")
}  # recall of the best trained heads; in the table only
LRU, WORTH, GUESSES = list(WAYS)[:3]


class Cell(NamedTuple):
    model: str
    residency: float
    link: float
    tokens_per_s: dict[str, float]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        return sorted(((name, self.tokens_per_s[name]) for name in WAYS), key=lambda item: -item[1])

    @property
    def gain(self) -> float:
        """Of the best over the next."""
        (_, best), (_, second) = self.ranked[:2]
        return best / second - 1


def simulated(model: str, profile: Profile, residency: float, link: float, passes: Sequence[Pass]) -> Cell:
    needs = needs_of(model, FORMATS.get(model))
    experts = sum(layer.experts for layer in needs.layers)
    found = {}
    for name, way in (WAYS | BETTER).items():
        scene = Scene(needs, profile, way.policy, round(residency * experts), link, way.recall, way.recall is not None)
        all_ = split(scene, passes).all
        counted = all_.passes[len(all_.passes) - TOKENS // 2 :]
        found[name] = len(counted) / sum(one.seconds for one in counted)
    return Cell(model, residency, link, found)


def story(model: str) -> list[Pass]:
    """Another document's prompt, then this one's prompt and its tokens."""
    needs = needs_of(model, FORMATS.get(model))
    found = generated(model, needs, FILLING, 1, 1, seed=3) + generated(model, needs, PROMPT, TOKENS + 1, 1, seed=2)
    for number, one in enumerate(found):
        assert one.step is not None
        one.step.index = number
    return found


def cells(models: Sequence[str], profile: Profile, say: Any) -> list[Cell]:
    found = []
    for model in models:
        passes = story(model)
        for residency in RESIDENCIES:
            began = time.monotonic()
            found += [simulated(model, profile, residency, link, passes) for link in LINKS]
            say(f"{model} with {residency:.1%} resident: simulated in {time.monotonic() - began:.0f} s")
    return found


def table(found: Sequence[Cell], about: str) -> str:
    lines = ["# When what pays: simulated, not measured", "", about, ""]
    names = list(WAYS | BETTER)
    lines += [f"| model | resident | link GB/s | {' | '.join(names)} | best | over the next |"]
    lines += ["|---|---:|---:|" + "---:|" * len(names) + "---|---:|"]
    for cell in found:
        figures = " | ".join(f"{cell.tokens_per_s[name]:.1f}" for name in names)
        best = cell.ranked[0][0] if cell.gain >= TIE else "tie"
        lines.append(
            f"| {cell.model} | {cell.residency:.1%} | {cell.link / 1e9:.0f} | {figures} | {best} | {cell.gain:+.0%} |"
        )
    return "\n".join([*lines, ""])


def draw(found: Sequence[Cell], path: Path, title: str) -> None:
    """A panel a model: link over residency, the colour of the best, its gain over the next and its tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    models = list(dict.fromkeys(cell.model for cell in found))
    figure = Figure(figsize=(4.1 * len(models) + 0.6, 5.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(panels, models, strict=True):
        for cell in (one for one in found if one.model == model):
            x, y = RESIDENCIES.index(cell.residency), LINKS.index(cell.link)
            name, rate = cell.ranked[0]
            clear = cell.gain >= TIE
            shade = min(1.0, 0.35 + 2.5 * cell.gain) if clear else 1.0
            colour = WAYS[name].colour if clear else "#eceff2"
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, alpha=shade, edgecolor="white", linewidth=2))
            says = f"{cell.gain:+.0%}" if clear else "tie"
            axis.text(x + 0.5, y + 0.62, says, ha="center", va="center", fontsize=12, fontweight="bold")
            axis.text(x + 0.5, y + 0.3, f"{rate:.1f} tok/s", ha="center", va="center", fontsize=8)
        axis.set(xlim=(0, len(RESIDENCIES)), ylim=(0, len(LINKS)), xlabel="experts resident", title=model)
        axis.set_xticks([i + 0.5 for i in range(len(RESIDENCIES))], [f"{r:.1%}" for r in RESIDENCIES])
        axis.set_yticks([i + 0.5 for i in range(len(LINKS))], [f"{link / 1e9:.0f} GB/s" for link in LINKS])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    panels[0].set_ylabel("link")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    best = {cell.ranked[0][0] for cell in found if cell.gain >= TIE}
    legend = [Patch(facecolor=way.colour, label=name) for name, way in WAYS.items() if name in best]
    legend.append(Patch(facecolor="#eceff2", label=f"the two best within {TIE:.0%}"))
    figure.legend(handles=legend, loc="outside lower left", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=110)


def claim(found: Sequence[Cell]) -> str:
    """What the picture says in one sentence."""
    wins = {name: [cell.gain for cell in found if cell.gain >= TIE and cell.ranked[0][0] == name] for name in WAYS}
    parts = [f"{name} wins {len(won)} (by up to {max(won):.0%})" for name, won in wins.items() if won]
    ties = len(found) - sum(map(len, wins.values()))
    return f"Simulated decode, {len(found)} cells: {', '.join(parts)}, {ties} ties"


def span(found: Sequence[Cell], of: str, over: str) -> str:
    ratios = [cell.tokens_per_s[of] / cell.tokens_per_s[over] - 1 for cell in found]
    return f"{of} {min(ratios):+.0%} to {max(ratios):+.0%} over {over}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="rtx5090", help="memory, arithmetic; its link is replaced")
    parser.add_argument("--launch", choices=["fused", "stock"], default="fused", help="host time: as in headline.py")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "docs" / "plots" / "whatpays.png")
    args = parser.parse_args()
    profile = machine(args.machine)
    profile = replace(profile, cold=LAUNCH, warm=LAUNCH) if args.launch == "fused" else profile
    found = cells(args.models, profile, lambda what: print(what, flush=True))
    about = (
        f"Virtual clock under the real schedules: one sequence, four bits, {args.machine}'s memory and arithmetic, "
        f"{args.launch} launches, tokens/s in decode. {claim(found)}. "
        f"Over all cells: {span(found, WORTH, LRU)}; {span(found, GUESSES, WORTH)}; "
        f"{span(found, next(iter(BETTER)), WORTH)}. A gain below {TIE:.0%} is a tie."
    )
    text = table(found, about)
    (args.out / "whatpays.md").write_text(text)
    rows = [cell._asdict() for cell in found]
    said = {"benchmark": "whatpays", "simulated": True, "machine": args.machine, "launch": args.launch, "cells": rows}
    (args.out / "whatpays.jsonl").write_text(json.dumps(said | {"run_on": describe()}) + "\n")
    draw(found, args.plot, claim(found))
    print(text)


if __name__ == "__main__":
    main()
