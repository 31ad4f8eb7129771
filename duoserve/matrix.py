"""What a benchmark runs of a model: its prompts as tokens, our engine or a peer with so much memory. Knows what was asked
for and the plan's arithmetic; knows nothing of processes, samples or tables. Imports torch late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duoserve.contest import Cell, Contender, Course, Request
from duoserve.core import Policy, Refusal
from duoserve.peers import LLAMA_CPP
from duoserve.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    from duoserve.engine import Engine
    from duoserve.plan import Plan

INTERPRETER = 500 << 20  # bytes that Python, torch and transformers take before any weight, about
LONGEST = 1 << 30


@dataclass(frozen=True)
class Matrix:
    """What is run: every policy at every residency, and the peers, on every prompt set at every batch size."""

    policies: list[str]
    residencies: list[float]
    sets: list[PromptSet]
    batches: list[int]
    peers: list[str]
    cap: int | None
    routes: str
    course: Course
    limit_tokens: int | None = None
    predictor: str | None = None
    gguf: Path | None = None  # the model as llama.cpp reads it


@dataclass(frozen=True)
class Subject:
    """The model as it is to be measured: prompts as tokens, the smallest plan that holds them, what a token needs."""

    name: str
    model: str | None
    folder: Path  # of the store
    checkpoint: Path
    device: str
    dtype: str
    cells: list[Cell]
    ctx: int
    sequences: int
    smallest: Plan  # without a predictor
    predictor_bytes: int
    checkpoint_bytes: int
    needs: Any
    peer_needs: Any
    expects: dict[str, int]  # dimensions by which llama.cpp's file is seen to be of this model

    def budget(self, share: float, asks: bool) -> int:
        """Bytes that give `share` of the experts a slot, by the plan's own arithmetic; `asks` a predictor, or none."""
        plan = self.smallest
        slots = max(plan.slots, round(share * plan.experts))
        extra = self.predictor_bytes if asks else 0
        return plan.planned_bytes + extra + (slots - plan.slots) * plan.slot_bytes

    def half_precision(self, share: float) -> int:
        """Bytes of a peer's weights with `share` of them in memory."""
        return max(1, round(share * self.checkpoint_bytes))


def study(model: str | None, matrix: Matrix, options: dict[str, Any]) -> Subject:
    """Open the model once, as small as it goes: that converts it if need be, and its tokenizer reads the prompts."""
    from duoserve import opening, outlook
    from duoserve.engine import DEMO
    from duoserve.hub import resolve
    from duoserve.manifest import is_store

    checkpoint = DEMO if model is None else resolve(model)
    if matrix.peers and is_store(checkpoint):
        what = f"{len(matrix.peers)} peers cannot load {checkpoint}, an expert store"
        raise Refusal("E_OPTION", what, "give the checkpoint, or --peers none")
    known = {name: value for name, value in options.items() if value is not None and name != "link"}
    with opening.load(model, budget="min", ctx=8, predictor="none", **known) as engine:
        cells, ctx = _cells(engine, matrix)
        folder, device = engine.store.folder, engine.device.name
        dtype, bf16_bytes = str(engine.dtype).removeprefix("torch."), engine.store.size.bf16_bytes
        config = engine.model.config.get_text_config()
    sequences = max(matrix.batches)
    extra: dict[str, Any] = {"budget": "min", "ctx": ctx, "sequences": sequences}
    plain = {name: value for name, value in known.items() if name != "threads"}
    looked = outlook.look(model, **plain, **extra)
    peers = outlook.look(model, **(plain | {"format": "bf16", "trunk": "bf16"}), **extra) if matrix.peers else None
    return Subject(
        name=model or "demo",
        model=model,
        folder=folder,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        cells=cells,
        ctx=ctx,
        sequences=sequences,
        smallest=looked.plan,
        predictor_bytes=opening.predictor_bytes(model, matrix.predictor),
        checkpoint_bytes=bf16_bytes * (2 if dtype == "float32" else 1),
        needs=looked.needs,
        peer_needs=peers.needs if peers else None,
        expects={"layers": config.num_hidden_layers, "hidden": config.hidden_size},
    )


def _cells(engine: Engine, matrix: Matrix) -> tuple[list[Cell], int]:
    """Every prompt set at every batch size as tokens, and the context that holds all of it."""
    from duoserve.sizing import model_limit

    new = matrix.course.new_tokens
    most = min((model_limit(engine.model.config) or LONGEST) - new, matrix.limit_tokens or LONGEST)
    if most < 1:
        raise Refusal("E_CTX", f"{new} new tokens leave no room for a prompt", "lower --new-tokens", 4)
    cells, ctx = [], 0
    for prompts in matrix.sets:
        rows = [_tokens(engine, prompt, most) for prompt in prompts.prompts]
        for batch in matrix.batches:
            requests = tuple(_request(engine, rows, n * batch, batch) for n in range(matrix.course.requests))
            ctx = max([ctx, *(len(r.ids[0]) + new for r in requests)])
            cells.append(Cell(prompts.name, batch, requests))
    return cells, ctx


def _tokens(engine: Engine, prompt: Prompt, most: int) -> list[int]:
    """Of a model without a tokenizer, bytes stand for tokens."""
    if engine.tokenizer is None:
        text = prompt.content if isinstance(prompt.content, str) else "\n\n".join(m["content"] for m in prompt.content)
        least = min(3, engine.model.config.get_text_config().vocab_size - 1)  # small ids are often special
        kinds = engine.model.config.get_text_config().vocab_size - least
        return [least + byte % kinds for byte in text.encode()[:most]]
    content = prompt.content
    if not isinstance(content, str) and not engine.tokenizer.chat_template:
        content = "\n\n".join(message["content"] for message in content)
    return engine.encode(content)[0][:most].tolist()


def _request(engine: Engine, rows: list[list[int]], first: int, batch: int) -> Request:
    from duoserve.answer import padding

    pad = padding(engine.model.generation_config) or 0
    taken = [rows[(first + i) % len(rows)] for i in range(batch)]
    longest = max(map(len, taken))
    ids = [[pad] * (longest - len(row)) + row for row in taken]
    return Request(ids, [[0] * (longest - len(row)) + [1] * len(row) for row in taken], pad)


def our_contenders(subject: Subject, matrix: Matrix, options: dict[str, Any]) -> Iterator[Contender]:
    for share in matrix.residencies:
        for policy in matrix.policies:
            yield ours(f"{policy} {share:.0%}", subject, share, policy, matrix, options)


def ours(row: str, subject: Subject, share: float, policy: str, matrix: Matrix, options: dict[str, Any]) -> Contender:
    """Our engine with `share` of the experts in slots."""
    from duoserve.opening import ASKING, TAKES_THE_DEMOS

    asks = policy in TAKES_THE_DEMOS or (policy in ASKING and matrix.predictor is not None)
    known = {name: value for name, value in options.items() if value is not None}
    known |= {"budget": subject.budget(share, asks), "ctx": subject.ctx, "sequences": subject.sequences}
    known["policy"] = policy
    if asks and matrix.predictor is not None:
        known["predictor"] = matrix.predictor
    folder, foresees = str(subject.folder), policy == Policy.BELADY.value
    return Contender(row, "duoserve", subject.model, folder, known, matrix.routes, matrix.cap, foresees=foresees)


def peer_contenders(subject: Subject, matrix: Matrix, options: dict[str, Any]) -> Iterator[Contender]:
    """Stock takes what it takes; Accelerate what the cap leaves, or the share of its weights that ours has of experts."""
    for name in matrix.peers:
        if name == "stock":
            yield peer("stock", name, subject, None, matrix.cap, options)
        elif name == LLAMA_CPP:
            assert matrix.gguf is not None
            yield llama_cpp(name, subject, matrix.gguf, matrix.cap, options)
        elif matrix.cap is not None:
            yield peer(name, name, subject, max(1, matrix.cap - INTERPRETER), matrix.cap, options)
        else:
            for share in matrix.residencies:
                yield peer(f"{name} {share:.0%}", name, subject, subject.half_precision(share), None, options)


def peer(
    row: str, name: str, subject: Subject, memory: int | None, cap: int | None, options: dict[str, Any]
) -> Contender:
    """A peer with at most `memory` bytes of weights, as far as it can be told so."""
    from duoserve.shelf import cache_dir

    known = {"dtype": subject.dtype, "device": subject.device, "threads": options.get("threads"), "memory": memory}
    scratch = cache_dir(options.get("cache_dir")).parent
    folder = str(subject.checkpoint)
    return Contender(row, name, folder, folder, known, cap=cap, scratch=str(scratch))


def llama_cpp(row: str, subject: Subject, gguf: Path, cap: int | None, options: dict[str, Any]) -> Contender:
    """llama.cpp with its defaults; where the cap leaves little room beside the copies that its kernels would rather read,
    without them: a Q4_0 of 866 MB under 900 MB read 590 MB a token because its copies had pushed out all that stayed mapped.
    """
    from duoserve.system import threads

    weights = _bytes(gguf)
    known = {
        "gguf": str(gguf.absolute()),
        "threads": threads(options.get("threads")),
        "ctx": subject.ctx,
        "sequences": subject.sequences,
        "repack": cap is None or 5 * weights < 4 * cap,
        "expects": subject.expects,
    }
    return Contender(row, LLAMA_CPP, None, str(gguf.absolute()), known, cap=cap)


def _bytes(gguf: Path) -> int:
    from duoserve.llamacpp import files

    return sum(path.stat().st_size for path in files(gguf))


def takes(contender: Contender, subject: Subject) -> int:
    """Bytes of memory, about."""
    if contender.cap is not None:
        return contender.cap
    if contender.engine == LLAMA_CPP:
        return 2 * _bytes(Path(contender.options["gguf"]))  # mapped, and copied in another order
    if contender.engine == "duoserve":
        return INTERPRETER + int(contender.options["budget"])
    return INTERPRETER + int(2.2 * subject.checkpoint_bytes)  # while transformers loads, most of it is there twice
