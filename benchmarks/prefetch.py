"""What guessing ahead is worth in decode: policies and predictors on the same slots take turns in one process, on a link
slowed so that the transfers of strong on-demand take as long as the compute, and on the machine as it is.

python -m benchmarks.prefetch [--rounds 7] [--tokens 96] [--budget half] [--predictor FOLDER] [--plot FILE.png]

Every row is an engine of its own, of the demo, with as many slots. A round lets each row decode the same prompts behind the
other; tokens must be identical. Ratios are within a round, their medians over rounds. The link's rate: bytes a token of
`lru` over seconds a token of an engine that holds all experts, measured first. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import duoserve
from benchmarks.machine import describe
from duoserve.core import Step
from predictor.baselines import AlwaysWrong, Gate, Oracle

PROMPTS = Path(__file__).parent / "prompts" / "documentation.jsonl"
GREEDY = {"do_sample": False, "repetition_penalty": 1.2, "eos_token_id": -1}  # the demo's own penalty, against loops
STRONG, ORACLE = "lru", "oracle"


class Row(NamedTuple):
    """`always`: never switched off."""

    name: str
    policy: str = "duoserve"
    guesses: str | None = None
    always: bool = False


ROWS = (
    Row("on-demand", "on-demand"),
    Row(STRONG, "lru"),
    Row("no guesses"),
    Row("gate", guesses="gate"),
    Row("trained", guesses="trained"),
    Row(ORACLE, guesses="oracle"),
    Row("always wrong", guesses="wrong"),
    Row("trained, never off", guesses="trained", always=True),
    Row("oracle, never off", guesses="oracle", always=True),
    Row("always wrong, never off", guesses="wrong", always=True),
)


class Bench:
    """The rows' engines on one link (bytes per second, None as it is), and what they did."""

    def __init__(self, args: argparse.Namespace, prompts: list[str], link: int | None):
        self.args, self.prompts = args, prompts
        self.engines: dict[str, Any] = {}
        self.samples: dict[str, list[float]] = {row.name: [] for row in ROWS}  # seconds a token, by round
        self.tokens: list[list[int]] | None = None
        self.recorded: list[Step] = []
        self.warm = open_demo(args, "none")
        self.warm.runtime.observers.append(self._note)
        self._run(self.warm)
        self.warm.runtime.observers.clear()
        for row in ROWS:
            engine = open_demo(args, "none", policy=row.policy, link=link)
            engine.predict(self._predictor(engine, row.guesses), row.always)
            self.engines[row.name] = engine

    def _note(self, step: Step) -> None:
        self.recorded.append(step)

    def _predictor(self, engine: Any, name: str | None) -> Any:
        experts = [layer.n_experts for layer in engine.store.layers]
        if name == "trained":
            from predictor.load import load

            return load(Path(self.args.predictor))
        if name == "gate":
            return Gate(engine.routers())
        if name is None:
            return None
        return (Oracle if name == "oracle" else AlwaysWrong)(sequences(self.recorded), experts)

    def _run(self, engine: Any) -> float:
        """Seconds a token in decode over all prompts; tokens are what they were before."""
        seconds, found = [], []
        for prompt in self.prompts:
            answer = engine.generate(prompt, max_new_tokens=self.args.tokens, **GREEDY)
            seconds.append(1 / answer.decode_tok_s)
            found.append(answer.token_ids)
        self.tokens = self.tokens or found
        assert found == self.tokens, "tokens differ"
        return statistics.mean(seconds)

    def round(self, number: int) -> None:
        names = [row.name for row in ROWS]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            self.samples[name].append(self._run(self.engines[name]))

    def figures(self) -> list[dict[str, Any]]:
        found = []
        for row in ROWS:
            stats = self.engines[row.name].stats()
            ratio = statistics.median(a / b for a, b in zip(self.samples[STRONG], self.samples[row.name], strict=True))
            asked = stats["hits"] + stats["in_flight"] + stats["misses"]
            found.append(
                {
                    "name": row.name,
                    "tok_s": 1 / statistics.median(self.samples[row.name]),
                    "x_lru": ratio,
                    "share_of_oracle_gain": self._share(row.name),
                    "samples_s": self.samples[row.name],
                    "hits": stats["hits"] / asked,
                    "in_flight": stats["in_flight"] / asked,
                    "misses": stats["misses"] / asked,
                    "guesses": {n: stats[f"guesses_{n}"] for n in ("ready", "late", "wrong")},
                    "prediction": stats["prediction"],
                }
            )
        return found

    def _share(self, name: str) -> float:
        """Of the seconds that the oracle saves over strong on-demand."""
        strong, oracle, mine = (self.samples[n] for n in (STRONG, ORACLE, name))
        gained = statistics.median(a - b for a, b in zip(strong, mine, strict=True))
        return gained / statistics.median(a - b for a, b in zip(strong, oracle, strict=True))

    def close(self) -> None:
        for engine in (self.warm, *self.engines.values()):
            engine.close()


def open_demo(args: argparse.Namespace, predictor: str, **options: Any) -> Any:
    return duoserve.load(None, predictor=predictor, threads=1, budget=options.pop("budget", args.budget), **options)


def sequences(steps: list[Step]) -> list[Step]:
    """Each prompt with its answer as one Step, as a trace would give it."""
    import torch

    from duoserve.core import Phase, Route

    groups: list[list[Step]] = []
    for step in steps:
        if step.phase is Phase.PREFILL:
            groups.append([])
        groups[-1].append(step)
    merged = []
    for group in groups:
        ids = torch.cat([s.ids_BS for s in group if s.ids_BS is not None], dim=1)
        places = torch.cat([s.positions_BS for s in group if s.positions_BS is not None], dim=1)
        step = Step(len(merged), Phase.PREFILL, ids.shape[1], 1, ids, places)
        for layer in range(len(group[0].routes)):
            routes = [s.routes[layer] for s in group]
            chosen, weights = (torch.cat([r[i] for r in routes]) for i in (1, 2))
            step.routes.append(Route(layer, chosen, weights))
        merged.append(step)
    return merged


def calibrate(args: argparse.Namespace, prompts: list[str]) -> dict[str, float]:
    """Bytes per second at which the transfers of strong on-demand take as long as the compute."""
    whole = open_demo(args, "none", budget="1GiB")
    strong = open_demo(args, "none", policy="lru")
    moved, seconds, tokens = [], [], args.tokens - 1
    for prompt in prompts * 2:
        seconds.append(1 / whole.generate(prompt, max_new_tokens=args.tokens, **GREEDY).decode_tok_s)
        strong.generate(prompt, max_new_tokens=1, **GREEDY)
        first = strong.device.copy.cost_done
        strong.generate(prompt, max_new_tokens=1, **GREEDY)
        prompt_bytes = strong.device.copy.cost_done - first
        strong.generate(prompt, max_new_tokens=args.tokens, **GREEDY)
        moved.append((strong.device.copy.cost_done - first - 2 * prompt_bytes) / tokens)
    compute_s, token_bytes = statistics.median(seconds[len(prompts) :]), statistics.median(moved)
    whole.close()
    strong.close()
    return {"compute_s": compute_s, "token_bytes": token_bytes, "link": token_bytes / compute_s}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(f"{'':26s}{'tok/s':>8s}{'x lru':>8s}{'of oracle':>11s}{'hits':>7s}{'flight':>8s}{'missed':>8s}  guessing")
    for row in rows:
        p = row["prediction"]
        state = f"{p['decision']}, {p['trials']} trials" if p else ""
        shares = f"{row['hits']:7.0%}{row['in_flight']:8.0%}{row['misses']:8.0%}"
        print(
            f"{row['name']:26s}{row['tok_s']:8.1f}{row['x_lru']:8.3f}{row['share_of_oracle_gain']:11.0%}{shares}  {state}"
        )


def plot(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.6 * len(found), 4.2), sharey=True)
    for axis, (title, rows) in zip(axes, found.items(), strict=True):
        names = [row["name"] for row in rows][::-1]
        values = [row["x_lru"] for row in rows][::-1]
        colours = ["#c0392b" if v < 0.97 else "#95a5a6" if v < 1.03 else "#2e86c1" for v in values]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f" {v:.2f}" for v in values], fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("decode speed over strong on-demand (lru), same slots")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--budget", default="half")
    parser.add_argument("--predictor", default=str(Path(duoserve.__file__).parent / "demo" / "predictor"))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    prompts = [json.loads(line)["text"] for line in PROMPTS.read_text().splitlines()[:: 220 // args.prompts]]
    prompts = prompts[: args.prompts]
    link = calibrate(args, prompts)
    print(
        f"compute {link['compute_s'] * 1e3:.2f} ms a token, {link['token_bytes'] / 1e3:.0f} kB a token: "
        f"a link of {link['link'] / 1e6:.1f} MB/s"
    )
    titles = {"link slowed: transfers take as long as compute": int(link["link"]), "this machine as it is": None}
    found = {}
    for title, rate in titles.items():
        bench = Bench(args, prompts, rate)
        for number in range(args.rounds):
            bench.round(number)
        found[title] = bench.figures()
        show(title, found[title])
        bench.close()
    if args.plot:
        plot(args.plot, found)
    about = {"rounds": args.rounds, "tokens": args.tokens, "prompts": len(prompts), "budget": args.budget}
    print(json.dumps({"benchmark": "prefetch", **about, "calibration": link, "machine": describe(), "runs": found}))


if __name__ == "__main__":
    main()
