"""What a user can ask of an engine, checked once. Knows names, sizes and defaults; knows nothing of models or machines."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from duoserve.core import Policy, Refusal, nearest

FORMATS = ("int4", "nf4", "bf16")
DTYPES = ("bfloat16", "float32", "float16")
MAX_THREADS = 4096
MAX_SEQUENCES = 256
POLICIES = tuple(policy.value for policy in Policy)
TOP_K = "top-k"
DEVICES = ("auto", "cpu", "cuda")
KNOWN = {"format": FORMATS, "trunk": FORMATS, "dtype": DTYPES, "device": DEVICES, "policy": POLICIES}

_NUMBER = r"(\d{1,15}(?:\.\d{1,15})?)"  # more digits than any machine has bytes are no number
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes in `6GiB`, `500MB`, `12G` or a plain number; decimal units are powers of ten, `i` units powers of two."""
    if type(text) is int and text > 0:
        return text
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([kmgt]?i?)b?\s*", text.lower()) if isinstance(text, str) else None
    if not match or match[2] == "i":
        raise Refusal("E_SIZE", f"{what} {text!r} is not a size", "write it like 6GiB, 500MiB or 12G")
    return int(float(match[1]) * (_UNITS | _BINARY)[match[2]])


def size(n_bytes: float) -> str:
    """`3.2 GiB`, for people."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def parse_slots(text: str | int) -> int | None:
    """Slots in `16`; None for `top-k`, as many as a token chooses experts in one layer."""
    if text == TOP_K:
        return None
    if not re.fullmatch(r"[1-9]\d{0,8}", str(text)):
        raise Refusal("E_OPTION", f"slots {text!r} is not a number of slots", f"write it like 16, or {TOP_K}")
    return int(text)


def parse_share(text: str, what: str = "budget") -> float:
    """0.15 for `15%`."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*%\s*", text)
    if not match or float(match[1]) == 0:
        raise Refusal("E_SIZE", f"{what} {text!r} is not a share", "write it like 15%")
    return float(match[1]) / 100


def parse_count(text: str | int, what: str = "count") -> int:
    """Tokens in `4096`, `4k` or `32k`; here k means 1024, as context lengths are written."""
    if type(text) is int and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d{1,12})\s*([km]?)\s*", text.lower()) if isinstance(text, str) else None
    if not match:
        raise Refusal("E_COUNT", f"{what} {text!r} is not a number of tokens", "write it like 4096 or 32k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]]


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise Refusal("E_OPTION", f"unknown {name} {value!r}", nearest(str(value), known))
    return value


class Flag(NamedTuple):
    """How a field stands on a command line: what it means there, and what it is written as."""

    help: str
    written: type = str


@dataclass(frozen=True)
class EngineConfig:
    """Options of `duoserve.load`; see there for their meaning. Those with a `Flag` are options of commands, too."""

    budget: Annotated[
        str | int | None,
        Flag("Memory for trunk, slots and KV: 6GiB, 15% of the bf16 model, half of its experts, min."),
    ] = None
    format: Annotated[str | None, Flag("Experts as int4 (default), nf4 or bf16.")] = None
    trunk: Annotated[
        str | None, Flag("Attention, shared experts and head as int4 (default on the CPU), nf4 or bf16.")
    ] = None
    dtype: Annotated[str | None, Flag("Arithmetic and trunk: bfloat16, float32 or float16.")] = None
    device: Annotated[str, Flag("auto, cpu or cuda.")] = "auto"
    ctx: Annotated[int | None, Flag("Tokens of context to plan for, such as 4096 or 32k.")] = None
    cache_dir: Annotated[str | None, Flag("Where converted stores are kept.")] = None
    threads: Annotated[int | None, Flag("Threads of arithmetic. Default: the real cores that may be used.", int)] = None
    policy: Annotated[
        str,
        Flag("duoserve; or, on the same slots, to compare with: lru, on-demand, lfp, mif, duoserve-paper."),
    ] = "duoserve"
    link: Annotated[
        str | int | None,
        Flag("Slow copies to so many bytes per second, such as 500MB: for experiments, CPU only."),
    ] = None
    slots: Annotated[str | int | None, Flag("At most so many slots, or top-k: what one layer's token chooses.")] = None
    sequences: int = 1
    kernels: Annotated[
        str | None, Flag("What `dep kernels` measured here: unquantised experts by grouped products.", Path)
    ] = None

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            if (value := getattr(self, name)) is not None:
                one_of(name, value, known)
        if self.link is not None and parse_size(self.link, "link") < 1:
            raise Refusal("E_OPTION", f"a link of {self.link} bytes a second moves nothing", "give at least 1")
        if self.slots is not None:
            parse_slots(self.slots)
        if isinstance(self.budget, str) and self.budget.strip().endswith("%"):
            parse_share(self.budget)
        elif self.budget not in (None, "min", "half"):
            parse_size(self.budget, "budget")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise Refusal("E_OPTION", f"threads {self.threads} is not between 1 and {MAX_THREADS}", "leave it out")
        if not 1 <= self.sequences <= MAX_SEQUENCES:
            raise Refusal(
                "E_OPTION", f"sequences {self.sequences} is not between 1 and {MAX_SEQUENCES}", "leave it out"
            )
        if self.ctx is not None and self.ctx < 1:
            raise Refusal("E_CTX", f"a context of {self.ctx} tokens holds nothing", "ask for at least 1")

    @property
    def made_as(self) -> str:
        """The format that experts are converted to."""
        return self.format or ("bf16" if self.dtype == "float32" else "int4")

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """Build from keyword options; dtype may be a torch dtype, ctx may read like `32k`."""
        names = tuple(f.name for f in fields(cls))
        for name in options:
            if name not in names:
                raise Refusal("E_OPTION", f"unknown option {name!r}", nearest(name, names))
        if options.get("dtype") is not None:
            options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        if options.get("ctx") is not None:
            options["ctx"] = parse_count(options["ctx"], "ctx")
        return cls(**options)
