"""What `duoserve dep` is told by name or by file, as the plain values that `dep_extension` plans with: a model's sizes, a
machine's costs, measured loads. Knows where each is kept; plans nothing. Imports torch late.

A machine of the fleet has no fitted lines: they are derived from its profile by roofline arithmetic, and its name says so.

    gemm        2 FLOP an element at the profile's rate of large products. Each is launched and reads one matrix of an expert
                before it multiplies: high where a GPU does both at once, by a factor of two where they take equally long
    attention   2 FLOP an element at the profile's rate of prompts, multi-head
    link        two bytes an element over the profile's PCIe, pinned, or over what --link says; the fuller side decides
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dep_extension import testbeds
from dep_extension.cost import Line, Machine, Model, Split
from dep_extension.imbalance import Loads, counted, settled, zipf
from duoserve.core import Refusal, nearest
from duoserve.headers import read_json, shown

LAUNCH_S = 10e-6  # of one exchange beside the wire: a launch and a completion
ELEMENT = 2  # bytes, bf16
LARGE = 16384  # rows of a product that is as fast as products become
CHUNK = 1024  # tokens over which loads are counted, of several sequences where they are made
MADE = "routes"
LOADS, LOADS_VERSION = "duoserve-dep-loads", 1
MAX_FILE_BYTES, MAX_CHUNKS = 16 << 20, 4096
_SEQUENCES, _LAYERS, _TOKENS = 8, 4, 512  # of made routes: tokens of a sequence
_SKEW = f"give a trace's folder, {MADE}, zipf:0.8, settled:0.8, or a file of loads"


def known_model(name: str | None, machine: str) -> Model:
    """A model of FinDEP's, cut as on that test bed; a specimen; or whatever has a config: checkpoint, store, the demo."""
    if name in testbeds.models():
        return testbeds.model(str(name), machine if machine in testbeds.names() else testbeds.names()[-1])
    from duoserve.specimens import SPECIMENS, needs_of, specimen

    if name in SPECIMENS:
        needs = needs_of(str(name))
        return _sized(str(name), specimen(str(name)).config, needs.layers[0].choices, needs.kv_bytes / needs.context)
    import torch

    from duoserve.checkpoint import quiet, read_config
    from duoserve.needs import CONTEXT
    from duoserve.plan import Sizes

    quiet()
    config = read_config(_folder(name))
    sizes = Sizes(config, torch.bfloat16)
    kv = sizes.kv_bytes(CONTEXT) / CONTEXT
    return _sized(name or "the demo", config, max(k or 1 for k in sizes.choices), kv)


def _folder(name: str | None) -> Path:
    from duoserve.engine import DEMO
    from duoserve.hub import resolve
    from duoserve.specimens import SPECIMENS

    if name is None:
        return DEMO
    try:
        return resolve(name, weights=False)
    except Refusal as refusal:
        if refusal.code != "E_MODEL" or Path(name).exists():
            raise
        what = str(refusal).split("; ")[0].removeprefix("E_MODEL: ")
        raise Refusal("E_MODEL", what, nearest(name, [*SPECIMENS, *testbeds.models()]), 3) from refusal


def _sized(name: str, config: Any, choices: int, kv_bytes: float) -> Model:
    """From the stock model on the meta device. `kv_bytes`: of a token in all layers. Layers without experts are left out:
    they are the attention group's alone. Embeddings and head are left out, too."""
    import torch

    from duoserve.checkpoint import build_meta, find_experts

    model = build_meta(config, torch.bfloat16)
    specs, text = find_experts(model), config.get_text_config()
    experts, hidden = specs[0].n_experts, int(text.hidden_size)
    one = sum(math.prod(shape) for shape in specs[0].parameters.values() if len(shape) == 2)
    block = specs[0].name.rpartition(".")[
        0
    ]  # the router and shared experts are beside the experts, attention beside it
    matrices = {
        n: p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith(block.rpartition(".")[0] + ".")
    }
    beside = {n: p for n, p in matrices.items() if n.startswith(block + ".")}
    shared = sum(p.numel() for p in beside.values() if p.shape[0] not in (1, experts))
    d_k, d_v = _heads(text)
    return Model(
        name=f"{name}, {len(specs)} layers",
        layers=len(specs),
        hidden=hidden,
        expert_hidden=round(one / 3 / hidden),
        experts=experts,
        choices=choices,
        shared=math.ceil(shared / one),
        heads=int(text.num_attention_heads),
        d_k=d_k,
        d_v=d_v,
        kv_elements=math.ceil(kv_bytes / ELEMENT / int(text.num_hidden_layers)),
        projections=sum(p.numel() for n, p in matrices.items() if n not in beside),
        attending=_attending(text, d_k, d_v),
    )


def _attending(text: Any, d_k: int, d_v: int) -> int:
    """Elements of a token that live at once while stock attention runs, at most, keys and values that are kept among them.

    Separate projections: queries are turned (as they were, turned halves, both products), else keys are while queries wait,
    else the outcome is laid out anew. MLA: queries twice (their parts turned, joined), latents twice, keys and values of all
    heads, keys joined, the outcome twice.
    """
    heads, latent = int(text.num_attention_heads), getattr(text, "kv_lora_rank", None)
    q, out = heads * d_k, heads * d_v
    if latent:
        turned = int(text.qk_rope_head_dim)
        return 3 * q + heads * (d_k - turned + d_v) + 2 * out + heads * turned + 2 * int(latent) + 4 * turned
    few = int(getattr(text, "num_key_value_heads", None) or heads)
    k, v = few * d_k, few * d_v
    return max(4 * q + k + v, 2 * q + 4 * k + v, q + 2 * k + 2 * v + 2 * out) + 2 * d_k


def _heads(text: Any) -> tuple[int, int]:
    """Elements of a head's key and value."""
    plain = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    latent = getattr(text, "qk_nope_head_dim", None)  # MLA: a part without position and one with
    d_k = latent + text.qk_rope_head_dim if latent else plain
    return int(d_k), int(getattr(text, "v_head_dim", None) or d_k)


def known_machine(
    name: str, model: Model, gpus: int, link: float | None = None, memory: float | None = None
) -> Machine:
    """A test bed of FinDEP's, a file that was calibrated, or a machine of the fleet, derived. `link`: bytes/s between two
    GPUs, of a derived one; `memory`: bytes of a GPU."""
    if name in testbeds.names():
        found = testbeds.named(name)
    elif _calibrated(name):
        from dep_extension import calibrate

        try:
            found = calibrate.load(Path(name))
        except ValueError as error:
            what, _, remedy = str(error).rpartition(": ")
            raise Refusal("E_PROFILE", what, remedy, 5) from error
    else:
        return _derived(name, model, gpus, link, memory)
    if link is not None or memory is not None:
        raise Refusal("E_OPTION", f"{name} has fitted links and known memory", "leave --link and --memory out")
    return found


def whose(name: str, machine: Machine) -> str | None:
    """Of a file that was calibrated, whether it was here; None of what is no such file."""
    from dep_extension.calibrate import named_here

    if name in testbeds.names() or not _calibrated(name):
        return None
    here = named_here()
    return "measured on this machine" if machine.name in here else f"measured on another machine than this, {here[0]}"


def _calibrated(name: str) -> bool:
    from dep_extension import calibrate

    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        return False
    if not path.exists():
        raise Refusal("E_PROFILE", f"there is no machine {name}", "calibrate one, or name one that is known", 3)
    data = _read(path, "E_PROFILE", "calibrate again")
    return isinstance(data, dict) and data.get("kind") == calibrate.KIND


def _read(path: Path, code: str, remedy: str) -> Any:
    try:
        return read_json(path, remedy, MAX_FILE_BYTES)
    except Refusal as refusal:
        raise refusal.under(code) from refusal


def _derived(name: str, model: Model, gpus: int, link: float | None, memory: float | None) -> Machine:
    from duoserve.fleet import machine, machines

    try:
        profile = machine(name)
    except Refusal as refusal:
        if refusal.status != 3:
            raise
        hint = nearest(name, [*testbeds.names(), *machines()])
        raise Refusal("E_PROFILE", f"no machine is known by the name {name!r}", hint, 3) from refusal
    if profile.device != "cuda" or profile.link is None:
        what = f"{name} is a {profile.device}, its profile has no link between devices"
        raise Refusal("E_PROFILE", what, "calibrate it instead", 3)
    card = profile.machine.get("gpu", name)
    capacity = memory or _capacity(card)
    rate, op_s = link or profile.link.pinned, profile.cold.op_s
    matrix_s = ELEMENT * model.hidden * model.expert_hidden / profile.memory
    return Machine(
        name=f"{gpus} x {card} (derived, not measured)",
        gpus=gpus,
        memory_bytes=capacity,
        gemm=Line(op_s + matrix_s, profile.weight_s("bf16", LARGE) / LARGE),
        attention=Line(op_s, 2 / profile.attention.prompt),
        links=Ports(gpus, LAUNCH_S, ELEMENT / rate),
        count_s=LAUNCH_S,
        source=f"derived from its profile by roofline arithmetic, not measured; GPUs exchange {rate / 1e9:g} GB/s each way "
        f"({'as asked' if link else 'PCIe, pinned: say --link for NVLink'})",
    )


def _capacity(card: str) -> float:
    said = re.search(r"(\d+) GB\b", card)
    if said is None:
        raise Refusal("E_PROFILE", f"{card!r} says 0 times how many GB it has", "say --memory 80GB", 3)
    return float(said[1]) * 1e9


@dataclass(frozen=True)
class Ports(Mapping[Split, Line]):
    """Links of GPUs that each have one port: what expert GPUs get, attention GPUs send, each the more the fewer they are."""

    gpus: int
    launch_s: float
    element_s: float

    def __getitem__(self, split: Split) -> Line:
        return Line(self.launch_s, self.element_s * max(1.0, split.eg / split.ag))

    def __contains__(self, split: object) -> bool:
        return isinstance(split, Split)

    def __iter__(self) -> Iterator[Split]:
        return (Split(self.gpus - eg, eg) for eg in range(1, self.gpus))

    def __len__(self) -> int:
        return self.gpus - 1


def known_loads(what: str, name: str | None, model: Model, seed: int = 0) -> Loads:
    """Of a trace's folder, of routes that are made with the model's published habits, of Zipf's law (what is hot changes, or
    is settled), or of a file."""
    try:
        if what == MADE:
            return _made(name, model, seed)
        law, colon, exponent = what.partition(":")
        if colon and law == "zipf":
            return zipf(model.experts, _exponent(what, exponent), seed=seed)
        if colon and law == "settled":
            return settled(model.experts, _exponent(what, exponent), CHUNK * model.choices, seed=seed)
        path = Path(what)
        if path.is_dir():
            return _traced(path, model)
        found = _listed(path)
        if found.experts != model.experts:
            raise Refusal("E_LOADS", f"loads are of {found.experts} experts, {model.name} has {model.experts}", _SKEW)
        return found
    except ValueError as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal("E_LOADS", str(error).rpartition(": ")[0] or str(error), _SKEW) from error


def _exponent(what: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 4:
        raise Refusal("E_LOADS", f"{what[:28]} has no exponent from 0 to 4", "write it like zipf:0.8")
    return found


def _made(name: str | None, model: Model, seed: int) -> Loads:
    from traces.generate import Shape, generate, law_of

    layers = min(_LAYERS, model.layers)
    shape = Shape((model.experts,) * layers, (model.choices,) * layers)
    made = [generate(law_of(str(name), shape), shape, _TOKENS, seed * _SEQUENCES + at) for at in range(_SEQUENCES)]
    side_by_side = [np.stack([ids[layer] for ids in made], axis=1) for layer in range(layers)]  # (tokens, sequences, K)
    routes = [ids_TSK.reshape(-1, model.choices) for ids_TSK in side_by_side]
    return counted(routes, model.experts, CHUNK, "routes made with published habits")


def _traced(folder: Path, model: Model) -> Loads:
    from traces.store import Traces

    traces = Traces(folder)
    about = traces.about
    if set(about.experts) != {model.experts}:
        what = f"{folder} is of {max(about.experts)} experts, {model.name} has {model.experts}"
        raise Refusal("E_TRACE", what, "give a trace of this model")
    sequences = [one.step.routes for one in traces.sequences(hidden=False)]
    routes = [
        np.concatenate([routes[layer].ids_TK.numpy() for routes in sequences]) for layer in range(len(about.experts))
    ]
    tokens = min(
        CHUNK, max(1, min(map(len, routes)) // 2)
    )  # two chunks of each layer: one judges what the other placed
    return counted(routes, model.experts, tokens, f"the trace {folder.name}")


def _listed(path: Path) -> Loads:
    if not path.exists():
        raise Refusal("E_LOADS", f"there are no loads {str(path)!r}", _SKEW, 3)
    data = _read(path, "E_LOADS", _SKEW)
    if not isinstance(data, dict) or (data.get("kind"), data.get("version")) != (LOADS, LOADS_VERSION):
        raise Refusal("E_LOADS", f"{path} is not {LOADS} version {LOADS_VERSION}", _SKEW, 5)
    rows = data.get("loads")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CHUNKS or not all(isinstance(r, list) for r in rows):
        raise Refusal("E_LOADS", f"{path} has no loads of 1 to {MAX_CHUNKS:,} chunks", _SKEW, 5)
    strange = [x for row in rows for x in row if type(x) not in (int, float) or not 0 <= x < 1e12]
    if strange:
        raise Refusal("E_LOADS", f"{path} has the load {shown(strange[0])}, not one from 0 to 1e12", _SKEW, 5)
    layers = data.get("layers")
    if layers is not None and (not isinstance(layers, list) or any(type(n) is not int for n in layers)):
        raise Refusal("E_LOADS", f"{path} has the layers {shown(layers)}, not a number for each chunk", _SKEW, 5)
    return Loads.of(rows, f"the file {path.name}", layers)
