"""Predictor folders on disk: writing them whole, and reading what may be anybody's. Knows names, shapes and bounds; knows
nothing of traces and training.

    predictor.json          kind, version, shape of the model, features, and what it was trained on
    predictor.safetensors   its tensors, bf16 or float32

Nothing in a folder is executed; what is not exactly as it must be is refused in one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save

from duoserve.core import Predictor, Refusal
from duoserve.durable import replacing
from duoserve.headers import DTYPE_BITS, read_header, read_json, regular_size, shown
from predictor.baselines import Popularity, TraceMatching
from predictor.features import Feature
from predictor.model import ExpertMLP, Head, Heads, Shape, mlp_sides

VERSION = 1
ABOUT, TENSORS = "predictor.json", "predictor.safetensors"
KINDS = ("head", "pre-attention", "mlp", "matching", "popularity")
REMEDY = "train it again"
MAX_ABOUT, MAX_TENSORS = 8 << 20, 2 << 30  # bytes
MAX_LAYERS, MAX_EXPERTS, MAX_DIM, MAX_UNITS, MAX_FEATURES = 1024, 65_535, 1 << 17, 65_536, 64
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


class Training(NamedTuple):
    """What a predictor was made from: hash of the training rows, digests of the prompts, figures on what was held out."""

    trace: str
    seed: int
    split: str
    rows: int
    prompts: list[str]  # digests; those that decided when to stop included
    domains: list[str]
    validation: dict[str, float]
    test: dict[str, float]


class Folder(NamedTuple):
    """A predictor folder, read and checked."""

    predictor: Any
    kind: str
    training: Training


Tensors = dict[str, torch.Tensor]


def refuse_others(folder: Path) -> None:
    """A predictor takes the place of a predictor, and of nothing else."""
    there = [file.name for file in folder.iterdir()] if folder.is_dir() else [folder.name] if folder.exists() else []
    others = sorted(set(there) - {ABOUT, TENSORS})
    if others:
        what = f"{folder} holds {len(others)} files that are no predictor's, {shown(others[0])} first"
        raise Refusal("E_EXISTS", what, "give an empty or new folder")


def save_folder(folder: Path, kind: str, predictor: Any, training: Training) -> None:
    """Write a folder; each file is there whole or not at all, the description last."""
    about, tensors = _PACK[kind](predictor)
    shape: Shape = predictor.shape
    data = {
        "kind": kind,
        "version": VERSION,
        "lead": predictor.lead,
        "fingerprint": shape.fingerprint,
        "experts": list(shape.experts),
        "choices": list(shape.choices),
        "dim": shape.dim,
        **about,
        "training": training._asdict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)  # a new one's tensors never stand beside an old one's description
    with replacing(folder / TENSORS) as stream:
        stream.write(save({name: t.contiguous() for name, t in tensors.items()}))
    with replacing(folder / ABOUT) as stream:
        stream.write((json.dumps(data, indent=1) + "\n").encode())


def load(folder: Path | str) -> Predictor:
    """The predictor of a folder, ready to serve."""
    found: Predictor = load_folder(folder).predictor
    return found


def load_folder(folder: Path | str) -> Folder:
    """The same with what it was trained on. Refusal E_PREDICTOR where anything is not as it must be."""
    folder = Path(folder)
    if regular_size(folder / ABOUT) < 0:
        raise Refusal("E_PREDICTOR", f"{folder} holds no {ABOUT}", "give a folder that `duoserve train` made", 3)
    try:
        about = read_json(folder / ABOUT, REMEDY, MAX_ABOUT)
        kind, shape, lead = _head(about, folder / ABOUT)
        expected = _EXPECT[kind](about, shape, lead)
        training = _training(about.get("training"))
        tensors = _tensors(folder / TENSORS, expected)
    except _Unsound as error:
        raise Refusal("E_PREDICTOR", f"{folder / ABOUT} {error}", REMEDY, 5) from error
    except Refusal as refusal:
        raise refusal.under("E_PREDICTOR") from refusal
    return Folder(_BUILD[kind](about, shape, lead, tensors), kind, training)


def check_model(predictor: Any, fingerprint: str) -> None:
    """Refuse a predictor that was trained for another model."""
    theirs = predictor.fingerprint
    if theirs is not None and theirs != fingerprint:
        what = f"the predictor {predictor.name!r} was trained for model {theirs}, this one is {fingerprint}"
        raise Refusal("E_PREDICTOR_MODEL", what, "train one from a trace of this model")


class _Unsound(ValueError):
    """What a description says that it must not."""


def _need(sound: bool, what: str) -> None:
    if not sound:
        raise _Unsound(what)


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _head(about: Any, path: Path) -> tuple[str, Shape, int]:
    _need(isinstance(about, dict), "does not describe a predictor")
    version, kind = about.get("version"), about.get("kind")
    _need(version == VERSION and type(version) is int, f"is of version {shown(version)}, this program reads {VERSION}")
    _need(isinstance(kind, str) and kind in KINDS, f"is of the unknown kind {shown(kind)}")
    experts, choices, fingerprint = about.get("experts"), about.get("choices"), about.get("fingerprint")
    for name, counts in (("experts", experts), ("choices", choices)):
        sound = isinstance(counts, list) and 0 < len(counts) <= MAX_LAYERS
        _need(sound and all(_is_int(n, 1, MAX_EXPERTS) for n in counts), f"has no sound {name!r}")
    fits = len(experts) == len(choices) and all(k <= e for k, e in zip(choices, experts, strict=True))
    _need(fits, "has choices that do not fit its experts")
    _need(
        isinstance(fingerprint, str) and re.fullmatch(r"[0-9a-f]{8,128}", fingerprint) is not None, "has no fingerprint"
    )
    _need(_is_int(about.get("lead"), 1, len(experts)), "has no sound 'lead'")
    _need(_is_int(about.get("dim"), 0, MAX_DIM), "has no sound 'dim'")
    return str(kind), Shape(fingerprint, tuple(experts), tuple(choices), about["dim"]), about["lead"]


def _training(data: Any) -> Training:
    _need(isinstance(data, dict) and set(data) == set(Training._fields), "does not say what it was trained on")
    texts = all(isinstance(data[name], str) and len(data[name]) < 200 for name in ("trace", "split"))
    lists = (data["prompts"], data["domains"])
    named = all(isinstance(v, list) and all(isinstance(t, str) and len(t) < 500 for t in v) for v in lists)
    counts = _is_int(data["seed"], -(1 << 63), 1 << 63) and _is_int(data["rows"], 0, 1 << 60)
    figures = all(_figures(data[name]) for name in ("validation", "test"))
    _need(texts and named and counts and figures, "has no sound 'training'")
    return Training(**data)


def _figures(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    return all(type(v) in (int, float) and abs(v) < 1e9 and math.isfinite(v) for v in data.values())


def _tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> Tensors:
    """The tensors of a file that has exactly those, in float32."""
    size = sum(math.prod(shape) for shape in expected.values()) * 4
    if size > MAX_TENSORS:
        raise _Unsound(f"asks for {size:,} bytes of tensors, at most {MAX_TENSORS:,} are read")
    header = read_header(path, REMEDY)
    if set(header.tensors) != set(expected):
        odd = min(set(header.tensors) ^ set(expected))
        raise Refusal("E_PREDICTOR", f"{path} and its description differ in the tensor {shown(odd)}", REMEDY, 5)
    for name, extent in header.tensors.items():
        if extent.dtype not in _DTYPES or extent.shape != expected[name]:
            what = f"{path} has {shown(name)} as {extent.dtype} {shown(list(extent.shape))}, not {list(expected[name])}"
            raise Refusal("E_PREDICTOR", what, REMEDY, 5)
    assert all(extent.dtype in DTYPE_BITS for extent in header.tensors.values())
    try:
        tensors = {name: t.float() for name, t in tensors_of(path.read_bytes()).items()}
    except Exception as error:  # whatever the bytes made safetensors say
        raise Refusal("E_PREDICTOR", f"{path} cannot be read ({shown(str(error))})", REMEDY, 5) from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise Refusal("E_PREDICTOR", f"{path} has values in {shown(name)} that are no numbers", REMEDY, 5)
    return tensors


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.bfloat16)


# Heads: "units", and "layers": features by layer


def _pack_heads(p: Heads) -> tuple[dict[str, Any], Tensors]:
    heads = {layer: head for layer, head in enumerate(p.heads) if head is not None}
    units = next((head.out_weight.shape[1] for head in heads.values()), 0)
    tensors = {f"{n}.{name}": _half(getattr(head, name)) for n, head in heads.items() for name in Head._fields[1:]}
    return {"units": units, "layers": {str(n): [str(f) for f in head.wanted] for n, head in heads.items()}}, tensors


def _heads_features(about: dict[str, Any], shape: Shape) -> dict[int, tuple[Feature, ...]]:
    """By layer, checked."""
    layers, last = about.get("layers"), len(shape.experts) - 1
    _need(isinstance(layers, dict) and 0 < len(layers) <= len(shape.experts), "has no sound 'layers'")
    assert isinstance(layers, dict)
    found = {}
    for word, names in layers.items():
        _need(re.fullmatch(r"0|[1-9]\d{0,3}", word) is not None and int(word) <= last, "names a layer that is none")
        _need(isinstance(names, list) and 0 < len(names) <= MAX_FEATURES, f"has no sound features of layer {word}")
        try:
            found[int(word)] = tuple(Feature.parse(name if isinstance(name, str) else shown(name)) for name in names)
        except ValueError as error:
            raise _Unsound(f"is not sound: {error}") from error
        for feature in found[int(word)]:
            latest = int(word) if feature.kind.startswith(("before", "input")) else int(word) - 1
            _need(feature.layer <= min(latest, last), f"looks at {feature} before it is known")
    return found


def _expect_heads(about: dict[str, Any], shape: Shape, lead: int) -> dict[str, tuple[int, ...]]:
    units = about.get("units")
    _need(_is_int(units, 1, MAX_UNITS), "has no sound 'units'")
    assert isinstance(units, int)
    expected: dict[str, tuple[int, ...]] = {}
    for layer, wanted in _heads_features(about, shape).items():
        n, e = sum(f.width(shape.experts, shape.dim) for f in wanted), shape.experts[layer]
        expected |= {f"{layer}.in_weight": (e + units, n), f"{layer}.in_bias": (e + units,)}
        expected[f"{layer}.out_weight"] = (e, units)
    return expected


def _build_heads(about: dict[str, Any], shape: Shape, lead: int, tensors: Tensors) -> Heads:
    wanted = _heads_features(about, shape)
    heads: list[Head | None] = [None] * len(shape.experts)
    for layer, features in wanted.items():
        heads[layer] = Head(features, *(tensors[f"{layer}.{name}"] for name in Head._fields[1:]))
    return Heads(_name(about), shape, lead, heads)


# ExpertMLP


def _pack_mlp(p: ExpertMLP) -> tuple[dict[str, Any], Tensors]:
    tensors = {f"{n}.{what}": _half(t) for n, pair in enumerate(p.linears) for what, t in zip("wb", pair, strict=True)}
    widths = [weight.shape[0] for weight, _ in p.linears[:-1]]
    return {"widths": widths}, tensors | {"popularity": p.popularity_LE, "affinity": p.affinity_LEE}


def _expect_mlp(about: dict[str, Any], shape: Shape, lead: int) -> dict[str, tuple[int, ...]]:
    widths = about.get("widths")
    sound = isinstance(widths, list) and 0 < len(widths) <= 32 and all(_is_int(w, 1, MAX_UNITS) for w in widths)
    _need(sound, "has no sound 'widths'")
    assert isinstance(widths, list)
    sides = mlp_sides(shape, widths)
    n_layers, e = len(shape.experts), max(shape.experts)
    expected: dict[str, tuple[int, ...]] = {"popularity": (n_layers, e), "affinity": (n_layers, e, e)}
    for n, (a, b) in enumerate(pairwise(sides)):
        expected |= {f"{n}.w": (b, a), f"{n}.b": (b,)}
    return expected


def _build_mlp(about: dict[str, Any], shape: Shape, lead: int, tensors: Tensors) -> ExpertMLP:
    linears = [(tensors[f"{n}.w"], tensors[f"{n}.b"]) for n in range(len(about["widths"]) + 1)]
    return ExpertMLP(_name(about), shape, lead, tensors["popularity"], tensors["affinity"], linears)


# Statistics


def _expect_popularity(about: dict[str, Any], shape: Shape, lead: int) -> dict[str, tuple[int, ...]]:
    return {"counts": (len(shape.experts), max(shape.experts))}


def _expect_matching(about: dict[str, Any], shape: Shape, lead: int) -> dict[str, tuple[int, ...]]:
    _need(_is_int(about.get("matrices"), 1, 1 << 20), "has no sound 'matrices'")
    return {"library": (about["matrices"], len(shape.experts), max(shape.experts))}


def _name(about: dict[str, Any]) -> str:
    kind, lead = about["kind"], about["lead"]
    return kind if lead == 1 else f"{kind} (lead {lead})"


_PACK: dict[str, Callable[[Any], tuple[dict[str, Any], Tensors]]] = {
    "head": _pack_heads,
    "pre-attention": _pack_heads,
    "mlp": _pack_mlp,
    "matching": lambda p: ({"matrices": len(p.library_CLE)}, {"library": _half(p.library_CLE)}),
    "popularity": lambda p: ({}, {"counts": p.counts_LE}),
}
_EXPECT: dict[str, Callable[[dict[str, Any], Shape, int], dict[str, tuple[int, ...]]]] = {
    "head": _expect_heads,
    "pre-attention": _expect_heads,
    "mlp": _expect_mlp,
    "matching": _expect_matching,
    "popularity": _expect_popularity,
}
_BUILD: dict[str, Callable[[dict[str, Any], Shape, int, Tensors], Any]] = {
    "head": _build_heads,
    "pre-attention": _build_heads,
    "mlp": _build_mlp,
    "matching": lambda about, shape, lead, t: TraceMatching(shape, t["library"], lead, _name(about)),
    "popularity": lambda about, shape, lead, t: Popularity(shape, t["counts"], _name(about)),
}
