"""Prompts dealt to attention ranks and micro-batches, their tokens as text, and figures of all ranks in one place. Knows
tokenizers, transformers' generate and what ranks report; knows nothing of layers or exchanges.

    prompt p   ->   attention rank p mod A, there micro-batch (p div A) mod r1; those of one micro-batch are one padded batch
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers

from dep_extension.executor import AttentionSide, ExpertSide, Opened
from duoserve.answer import ends as ends_of
from duoserve.answer import padding
from duoserve.core import Refusal
from duoserve.tokenizer import read_tokenizer

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Asked:
    """What to answer, and how tokens are drawn; None: as the model says."""

    prompts: tuple[str, ...]
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise Refusal("E_PROMPT", "there are 0 prompts", 'give one with --prompt "..."')
        if self.max_new_tokens < 1:
            raise Refusal(
                "E_OPTION", f"max_new_tokens={self.max_new_tokens} leaves nothing to answer with", "ask for 1"
            )
        for name, value, most in (("temperature", self.temperature, 100.0), ("top_p", self.top_p, 1.0)):
            if value is not None and not 0 <= value <= most:
                raise Refusal("E_SETTING", f"{name} {value} is out of range", f"give one from 0 to {most:g}")

    @property
    def sampling(self) -> dict[str, Any]:
        """For transformers' generate."""
        if self.temperature == 0:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        known = {name: value for name, value in given.items() if value is not None}
        return known | ({"do_sample": True} if known else {})


class Answer(NamedTuple):
    """As `duoserve.answer.Answer`, of prompt number `prompt`."""

    prompt: int
    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tok_s: float | None
    finish: str


def deal(many: int, ranks: int, r1: int) -> list[list[list[int]]]:
    """The numbers of the prompts of each attention rank's micro-batches."""
    return [[list(range(rank + i * ranks, many, ranks * r1)) for i in range(r1)] for rank in range(ranks)]


class Reader:
    """Prompts as ids, and ids as text."""

    def __init__(self, opened: Opened):
        self.tokenizer = read_tokenizer(opened.store.folder)
        if self.tokenizer is None:
            what = f"{opened.store.folder} has 0 tokenizer files"
            raise Refusal("E_TOKENIZER", what, "add the tokenizer", 3)

    def encode(self, prompt: str, system: str | None) -> list[int]:
        """Through the model's chat template, where it has one."""
        system_messages = [{"role": "system", "content": system}] if system else []
        messages = [*system_messages, {"role": "user", "content": prompt}]
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = self.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        if not ids:
            raise Refusal("E_PROMPT", "the prompt has 0 tokens", "write at least one word")
        return list(ids)


def works(side: AttentionSide, reader: Reader, asked: Asked, mine: Sequence[Sequence[int]]) -> list[Callable[[], Any]]:
    """What this rank's micro-batches do. Refused where a prompt leaves no room for an answer."""
    ids = {p: reader.encode(asked.prompts[p], asked.system) for batch in mine for p in batch}
    longest = max(map(len, ids.values()), default=0)
    if longest >= side.plan.ctx:
        what = f"the prompt has {longest} tokens, the context {side.plan.ctx}"
        raise Refusal("E_CTX", what, "shorten it, or load with a larger --ctx", 4)
    if asked.seed is not None:
        torch.manual_seed(asked.seed + side.hub.sender)
    return [
        lambda batch=batch: answer(side, reader, asked, {p: ids[p] for p in batch}) if batch else []  # type: ignore[misc]
        for batch in mine
    ]


def answer(side: AttentionSide, reader: Reader, asked: Asked, ids: dict[int, list[int]]) -> list[Answer]:
    """Generate for one micro-batch: prompts padded on the left."""
    config, device = side.model.generation_config, side.device.torch_device
    ends, pad = ends_of(config), padding(config) or 0
    longest = max(map(len, ids.values()))
    padded = [[pad] * (longest - len(one)) + one for one in ids.values()]
    mask = [[0] * (longest - len(one)) + [1] * len(one) for one in ids.values()]
    limit = min(asked.max_new_tokens, side.plan.ctx - longest)
    clock = _Clock()
    out_BS = side.model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=limit,
        pad_token_id=pad,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
        **asked.sampling,
    )
    new = {p: _until_end(row[longest:].tolist(), ends) for p, row in zip(ids, out_BS, strict=True)}
    return [
        Answer(
            p,
            reader.tokenizer.decode(tokens, skip_special_tokens=True),
            len(ids[p]),
            len(tokens),
            clock.times[1] - clock.times[0],
            clock.rate(len(tokens)),
            "stop" if tokens and tokens[-1] in ends else "length",
        )
        for p, tokens in new.items()
    ]


def _until_end(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """A row that ended before others of its batch was filled up."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: last + 1]


class _Clock(transformers.StoppingCriteria):
    """When it was made, and when each token came."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def rate(self, n: int) -> float | None:
        """Tokens per second behind the first of `n`."""
        return (n - 1) / (self.times[n] - self.times[1]) if n > 1 else None


def gathered(tell: Callable[[str], list[str]], mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, in order of ranks; JSON, since objects would be pickled. All ranks call it at one place."""
    return [json.loads(one) for one in tell(json.dumps(mine))]


def report(side: AttentionSide | ExpertSide) -> dict[str, Any]:
    """A rank's own figures; bytes and seconds."""
    if isinstance(side, AttentionSide):
        shared = side.hub.shared
        return {
            "role": "attention",
            "passes": side.hub.steps,
            "rows_sent": side.hub.rows_sent,
            "rows_again": side.hub.rows_again,
            "ctx": side.plan.ctx,
            "planned_bytes": side.plan.planned_bytes,
            "budget_bytes": side.plan.budget_bytes,
            "shared_at_their_turn": len(shared.at_their_turn),
            "shared_elsewhere": shared.elsewhere,
        }
    runtime, share = side.rank.runtime, side.rank.share
    counts, copy = runtime.transfer.counts(), side.device.copy
    return {
        "role": "expert",
        "rows": side.rank.rows,
        "slots": side.slots,
        "experts": share.n_experts,
        "planned_bytes": side.slots * share.slab_bytes,
        "hits": counts.hits,
        "in_flight": counts.in_flight,
        "misses": counts.misses,
        "bytes_moved": copy.cost_done,
        "stall_s": dict(runtime.stalls),
    }


def figures(opened: Opened, plan: dict[str, Any], answers: Sequence[Answer], ranks: Sequence[Any]) -> dict[str, Any]:
    """The JSON line of `duoserve chat`, over all prompts and ranks; first the text of the first prompt."""
    first = answers[0]
    experts = [rank for rank in ranks if rank["role"] == "expert"]
    rates = [one.decode_tok_s for one in answers if one.decode_tok_s is not None]
    summed = {
        name: sum(rank[name] for rank in experts)
        for name in ("slots", "experts", "hits", "in_flight", "misses", "bytes_moved")
    }
    return {
        "text": first.text,
        "finish": first.finish,
        "prompt_tokens": sum(one.prompt_tokens for one in answers),
        "new_tokens": sum(one.new_tokens for one in answers),
        "ttft_s": first.ttft_s,
        "decode_tok_s": sum(rates) if rates else None,
        "residency": summed["slots"] / summed["experts"],
        **summed,
        "ctx": min(rank["ctx"] for rank in ranks if rank["role"] == "attention"),
        "format": opened.store.format,
        "trunk": opened.trunk,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "policy": opened.config.policy,
        "threads": torch.get_num_threads(),
        "planned_bytes": sum(rank["planned_bytes"] for rank in ranks),
        "plan": plan,
        "answers": [one._asdict() for one in answers],
        "ranks": list(ranks),
    }
