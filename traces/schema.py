"""What a trace directory holds: files, columns, versions, and what it says of itself. Knows names and types; opens nothing.

    trace.json            About: versions, model, shape, options of the run, figures of the machine
    prompts.jsonl         a PromptInfo a line; a prompt's index is its sequence's number
    routers.safetensors   the model's routers (duoserve.routers)
    part-00000.parquet    one flush each: one row group, a row per (token, layer), by sequence, layer, step, position

| column | type | |
|---|---|---|
| sequence | int32 | which prompt, and what was made from it |
| step | int32 | the forward pass, counted over the run |
| position | int32 | of the token in its sequence |
| token | int32 | its id; -1 where the caller gave embeddings |
| phase | string | prefill or decode |
| layer | int16 | MoE layers only, from 0 |
| ids, weights | list of uint16, float32 | the router's choice, in its order; an id equal to the number of experts is none |
| hidden, input | list of float16 | the router's input, and what entered the decoder layer; only with `--hidden` |

Within a sequence, a later step that begins at position p cancels earlier rows at p and behind it: drafts that were rejected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from duoserve.core import Refusal

VERSION = 1
ABOUT, PROMPTS = "trace.json", "prompts.jsonl"
# metadata of every part
KEY_VERSION, KEY_FINGERPRINT, KEY_COLUMNS = b"duoserve.trace", b"duoserve.fingerprint", b"duoserve.columns"
PHASES = ("prefill", "decode")
REMEDY = "record it again"
MAX_EXPERTS = 1 << 16

_INTS = ("sequence", "step", "position", "token")
_LIST = {"ids": pa.uint16(), "weights": pa.float32()}
STATES = ("hidden", "input")


def part_schema(fingerprint: str, width: int | None, states: tuple[str, ...] = ()) -> pa.Schema:
    """Arrow's schema of a part; `width`: values of a hidden state, of the columns in `states`."""
    fields = [pa.field(name, pa.int32(), nullable=False) for name in _INTS]
    fields.append(pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False))
    fields.append(pa.field("layer", pa.int16(), nullable=False))
    for name, of in _LIST.items():
        fields.append(pa.field(name, pa.list_(pa.field("element", of, nullable=False)), nullable=False))
    for name in states:
        of = pa.list_(pa.field("element", pa.float16(), nullable=False), width or 0)
        fields.append(pa.field(name, of, nullable=False))
    said = {KEY_VERSION: str(VERSION), KEY_FINGERPRINT: fingerprint, KEY_COLUMNS: " ".join(f.name for f in fields)}
    return pa.schema(fields, metadata=said)


class PromptInfo(NamedTuple):
    """Where a sequence came from. `digest`: of the prompt's token ids; `n_tokens`: of the prompt."""

    index: int  # type: ignore[assignment]  # a tuple has a method of this name
    id: str
    domain: str
    digest: str
    n_tokens: int


@dataclass(frozen=True)
class About:
    """What a trace says of itself.

    `layer_s`: median seconds of one layer in decode while tracing; `slab_s`: seconds that one slab takes over the link;
    both None until the run ended. `options`: of the run, as they were given.
    """

    schema: int
    fingerprint: str
    dtype: str
    experts: list[int]
    choices: list[int]
    hidden: bool
    layer_s: float | None = None
    slab_s: float | None = None
    residency: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Any, where: object) -> About:
        """From JSON that may be anybody's."""
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise Refusal("E_TRACE", f"{where} does not describe a trace", REMEDY, 5)
        if data["schema"] != VERSION:
            what = f"{where} is of a trace of version {data['schema']}, this program reads {VERSION}"
            raise Refusal("E_TRACE", what, REMEDY, 5)
        names = cls.__dataclass_fields__
        wrong = sorted(set(names) - set(data)) + [n for n, ok in _checks(data).items() if not ok]
        if wrong:
            raise Refusal("E_TRACE", f"{where} has no sound {wrong[0]!r}", REMEDY, 5)
        return cls(**{name: data[name] for name in names})


def _checks(data: dict[str, Any]) -> dict[str, bool]:
    counts = {name: data.get(name) for name in ("experts", "choices")}
    sound = {name: _counts(value) for name, value in counts.items()}
    sound["choices"] = all(sound.values()) and len(data["experts"]) == len(data["choices"])
    texts = {name: isinstance(data.get(name), str) for name in ("fingerprint", "dtype")}
    seconds = {n: data.get(n) is None or type(data[n]) in (int, float) for n in ("layer_s", "slab_s", "residency")}
    texts["dtype"] = data.get("dtype") in ("bfloat16", "float16", "float32")
    kinds = {"hidden": type(data.get("hidden")) is bool, "options": isinstance(data.get("options"), dict)}
    return sound | texts | seconds | kinds


def _counts(value: object) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= 1024:
        return False
    return all(type(n) is int and 0 < n < MAX_EXPERTS for n in value)


def prompt_of(data: Any, index: int, where: object) -> tuple[PromptInfo, int | None]:
    """A line of prompts.jsonl, and how many tokens of its sequence count, where that was noted."""
    kinds = {"index": int, "id": str, "domain": str, "digest": str, "n_tokens": int}
    sound = isinstance(data, dict) and all(type(data.get(name)) is kind for name, kind in kinds.items())
    kept = data.get("kept") if sound else None
    if not sound or data["index"] != index or not (kept is None or type(kept) is int):
        raise Refusal("E_TRACE", f"{where} has no sound line {index + 1}", REMEDY, 5)
    return PromptInfo(*(data[name] for name in kinds)), kept
