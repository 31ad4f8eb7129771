"""The seam to transformers, and beside sizing.py the only file that touches what transformers does not document.

Knows how transformers renames and fuses a checkpoint's tensors, and how a stock model is built on the meta device with its
routed experts taken out. Knows no formats, stores, slots or streams. Tested on transformers 5.17 and on the newest:
`LoadStateDictConfig`, `_load_pretrained_model`, `_finalize_model_loading`, `get_model_conversion_mapping`,
`rename_source_key`, `WeightConverter.convert`, `all_tied_weights_keys` and `_keys_to_ignore_on_load_missing` are private
there and may move.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from duoserve import published
from duoserve.core import Refusal
from duoserve.folder import CONFIG, read_raw, side_files, weight_files
from duoserve.headers import check_bounds
from duoserve.published import Stored

_FLOATS = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
_SAMPLED_TENSORS = 4096
_WHOLE_FILE = 64 << 20
# transformers builds and loads under settings of the whole process: two threads at it would leave torch's default dtype
# changed for good
_ALONE = threading.RLock()
_MAX_MODULES = 1 << 16  # that a model is built of; the largest published ones have some thousands


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def quiet() -> None:
    """transformers' own progress bars and reports would break ours; its errors still rise."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def read_config(folder: Path) -> Any:
    """The stock config, of the model before it was quantised; refuses what would run code or what we cannot read."""
    raw = read_raw(folder)
    published.scheme(raw)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return _unquantised(config)
    except Exception as error:
        kind = raw.get("model_type")
        raise Refusal(
            "E_CONFIG",
            f"transformers {transformers.__version__} cannot read the config of model type {kind!r}",
            "use a model type that it knows, or a newer transformers",
        ) from error


def _unquantised(config: Any) -> Any:
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        vars(part).pop("quantization_config", None)
    return config


def build_meta(config: Any, dtype: torch.dtype) -> Any:
    """The stock model for `config` with every tensor on the meta device, in evaluation mode."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refusal(
            "E_CONFIG",
            f"model type {config.model_type!r} has no causal language model in transformers",
            "use a text-generation checkpoint",
        )
    try:
        with _ALONE, torch.device("meta"), _at_most(_MAX_MODULES):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # a family's code over a config that it does not expect: anything can come
        what = f"transformers {transformers.__version__} cannot build {config.model_type!r} ({_first_line(error)})"
        raise Refusal("E_CONFIG", what, "check config.json, or use a newer transformers") from error
    return model.eval()


@contextmanager
def _at_most(n: int) -> Iterator[None]:
    """Building may register `n` modules: a config can ask for any number, by names that only its family knows."""
    count = itertools.count(1)

    def hook(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if next(count) > n:
            raise ValueError(f"more than {n:,} modules")

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class ExpertsSpec:
    """One routed-experts module of the meta model. `module` says how to compute: gate, biases, orientation, activation."""

    name: str
    module: Any

    @property
    def n_experts(self) -> int:
        return int(self.module.num_experts)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes per expert, by parameter name, in the checkpoint's orientation."""
        return {name: tuple(p.shape[1:]) for name, p in self.module.named_parameters(recurse=False)}


def find_experts(model: Any) -> list[ExpertsSpec]:
    """The modules behind transformers' experts interface, in layer order; refuses models that do not have it."""
    specs = [
        ExpertsSpec(name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")
    ]
    if not specs:
        kinds = {type(m).__name__ for m in model.modules() if re.search(r"Expert|MoE|Moe|MOE", type(m).__name__)}
        kind = model.config.model_type
        if kinds:
            raise Refusal(
                "E_LAYOUT",
                f"{kind!r} lays out its experts ({', '.join(sorted(kinds)[:2])}) outside transformers' experts "
                "interface",
                "use a family that has it, such as mixtral, qwen3_moe, deepseek_v3 or gpt_oss",
            )
        raise Refusal(
            "E_NOT_MOE",
            f"{kind!r} has 0 routed experts",
            "run it with transformers itself; there is nothing to offload",
        )
    for spec in specs:
        _check_choices(model, spec)
        for name, p in spec.module.named_parameters(recurse=False):
            if p.ndim not in (2, 3) or p.shape[0] != spec.n_experts:
                raise Refusal(
                    "E_LAYOUT",
                    f"{spec.name}.{name} has shape {tuple(p.shape)}, not one row per expert ({spec.n_experts})",
                    "this family cannot be offloaded yet",
                )
    return specs


def _check_choices(model: Any, spec: ExpertsSpec) -> None:
    """A token takes at least one expert and none twice: else its router fails, but not before the first prompt."""
    block = model.get_submodule(spec.name.rpartition(".")[0])
    for module in (block, *block.children()):
        k = getattr(module, "top_k", None)
        if type(k) is int and not 1 <= k <= spec.n_experts:
            what = f"the config of this {model.config.model_type!r} lets a token choose {k} of {spec.n_experts} experts"
            raise Refusal("E_CONFIG", what, "fetch the checkpoint again", 5)


def check_config(folder: Path) -> None:
    """Refuse what `Checkpoint` would refuse for its config, before the weights are there."""
    find_experts(build_meta(read_config(folder), torch.bfloat16))


class Checkpoint:
    """A hub-layout folder of safetensors files, seen through transformers' conversion mapping.

    Tensors are memory-mapped; only what is asked for is read. `expert` gives one expert's share of one parameter.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.scheme = published.scheme(read_raw(folder))
        self._tensors = published.tensors(_stored(folder), self.scheme)
        self.model = build_meta(self.config, self.dtype)
        self.specs = find_experts(self.model)
        self._plan()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most values are stored in, quantised ones apart; float32 where those would fit nothing narrower."""
        sizes: dict[str, int] = {}
        for tensor in self._tensors.values():
            if isinstance(tensor, published.Fp8):
                return torch.float32
            if isinstance(tensor, Stored):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        common = max(sizes, key=lambda name: sizes[name], default="nothing")
        if common not in _FLOATS:
            raise Refusal(
                "E_QUANTISED", f"the checkpoint's weights are stored as {common}", "use a bf16, f16 or f32 checkpoint"
            )
        return _FLOATS[common]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model: its config, its tensors' names and shapes, and their bytes (sampled where large)."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for file in weight_files(self.folder):
            with open(file, "rb") as stream:
                digest.update(f"{file.name} {file.stat().st_size}".encode())
                if file.stat().st_size <= _WHOLE_FILE:
                    digest.update(stream.read())
                    continue
                header = int.from_bytes(stream.read(8), "little")
                text = stream.read(header)
                digest.update(text)
                starts = sorted(t["data_offsets"][0] for n, t in json.loads(text).items() if n != "__metadata__")
                for start in starts[:: max(1, len(starts) // _SAMPLED_TENSORS)]:
                    stream.seek(8 + header + start)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:32]

    def side_files(self) -> dict[str, bytes]:
        """Config, generation config, tokenizer and chat template: of the model as it is here, no longer quantised."""
        files = {file.name: file.read_bytes() for file in side_files(self.folder)}
        if self.scheme:
            files[CONFIG] = json.dumps(published.without(read_raw(self.folder)), indent=2).encode()
        return files

    def trunk(self, plain: torch.dtype) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of each tensor that is no routed expert and that the model uses.

        `plain` is what `trunk_pieces` makes of quantised ones; the others stay as they are stored.
        """
        for key in self._trunk:
            tensor = self._tensors[key]
            yield key, tensor.dtype if isinstance(tensor, Stored) else _NAMES[plain], tensor.shape

    def trunk_pieces(self, key: str, plain: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor of `trunk`, some rows at a time."""
        tensor = self._tensors[key]
        wanted = None if isinstance(tensor, Stored) else plain
        if len(tensor.shape) < 2:
            yield tensor.whole(wanted)
            return
        step = max(1, published.AT_ONCE // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, tensor.shape[0], step):
            yield tensor.rows(start, min(tensor.shape[0], start + step), wanted)

    def total_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def expert(self, spec: ExpertsSpec, param: str, e: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        """One expert's share of one parameter, shaped as in `spec.parameters`, in the checkpoint's dtype, or `wanted`."""
        target = f"{spec.name}.{param}"
        sources = self._experts[target]
        if None in sources:  # stored fused, under the same name
            return self._tensors[sources[None][0]].rows(e, e + 1, wanted)[0]
        converter = copy.deepcopy(self._converter[next(iter(sources))])
        for pattern, keys in sources.items():
            whole = len(keys) > 1  # narrower before tensors are joined, which takes their size once more
            part = self._tensors[keys[e]].whole(wanted) if whole else self._tensors[keys[0]].rows(e, e + 1, wanted)
            converter.add_tensor(target, keys[0], pattern, cast(Any, lambda part=part: part))
            del part
        value = converter.convert(target, model=self.model, config=self.config)[target]
        value = value[0] if isinstance(value, list) else value
        return value[0]

    def _plan(self) -> None:
        """Sort the tensors into trunk, experts (target -> source pattern -> keys) and what the model ignores."""
        known = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._converter = {pattern: c for c in converters for pattern in c.source_patterns}
        targets = {f"{s.name}.{p}": s for s in self.specs for p in s.parameters}
        self._experts: dict[str, dict[Any, list[str]]] = {}
        self._trunk: list[str] = []
        self._plain_trunk: dict[str, str] = {}  # checkpoint's name -> model's, where nothing but the name changes
        self.ignored: list[str] = []
        given: dict[str, str | None] = {}  # names in the model's trunk that are there -> the converter's pattern
        for key in sorted(self._tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], self.model.base_model_prefix, known)
            if name in targets:
                self._experts.setdefault(name, {}).setdefault(pattern, []).append(key)
            else:
                (self._trunk if name in known else self.ignored).append(key)
                if name in known:
                    given[name] = pattern
                if name in known and pattern is None:
                    self._plain_trunk[key] = name
        for target, spec in targets.items():
            for keys in self._experts.get(target, {"": []}).values():
                if len(keys) not in (1, spec.n_experts):
                    raise Refusal(
                        "E_CORRUPT",
                        f"{target} needs {spec.n_experts} experts, the checkpoint has {len(keys)}",
                        "fetch the checkpoint again",
                        5,
                    )
        self._check_names(set(known) - set(targets), given)
        self._check_shapes(known)

    def _check_names(self, wanted: set[str], given: dict[str, str | None]) -> None:
        """Refuse a trunk that lacks what loading would miss. Of what several tensors make together, one is enough here."""
        there = set(given)
        for name, pattern in given.items():
            targets = self._converter[pattern].target_patterns if pattern else []
            if len(targets) > 1 and targets[0] not in name:
                return  # one becomes several by a pattern that is not understood here: loading will tell
            there |= {name.replace(targets[0], target, 1) for target in targets[1:]}
        tied: dict[str, set[str]] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            tied.setdefault(source, {source}).add(target)
        there |= {name for names in tied.values() if names & there for name in names}
        optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        missing = {name for name in wanted - there if not any(pattern.search(name) for pattern in optional)}
        if missing:
            raise _lacking(missing)

    def _check_shapes(self, known: dict[str, Any]) -> None:
        """Every tensor has the shape that the config says; from headers alone, but for one expert per kind of layer."""
        kinds: dict[Any, tuple[str, list[tuple[int, ...]]]] = {}
        for spec in self.specs:
            for param, shape in spec.parameters.items():
                sources = self._experts[f"{spec.name}.{param}"]
                integers = [key for keys in sources.values() for key in keys if self._tensors[key].dtype[0] in "UI"]
                if integers:
                    raise _integers(integers[0], self._tensors[integers[0]].dtype)
                stored = [self._tensors[key].shape for keys in sources.values() for key in keys]
                if (param, shape) not in kinds:
                    self._same(f"{spec.name}.{param} of one expert", tuple(self.expert(spec, param, 0).shape), shape)
                    kinds[param, shape] = spec.name, stored
                for keys in sources.values():
                    for key in keys:
                        self._same(key, self._tensors[key].shape, self._tensors[keys[0]].shape)
                for got, want in zip(stored, kinds[param, shape][1], strict=False):
                    self._same(f"a tensor of {spec.name}.{param}", got, want)
        for key, name in self._plain_trunk.items():
            if known[name].is_floating_point() and self._tensors[key].dtype[0] in "UI":
                raise _integers(key, self._tensors[key].dtype)
            self._same(key, self._tensors[key].shape, tuple(known[name].shape))

    @staticmethod
    def _same(what: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
        if got != want:
            raise Refusal(
                "E_CORRUPT",
                f"{what} has shape {got}, should have {want}",
                "fetch a checkpoint that matches its config",
                5,
            )


def _lacking(names: set[str]) -> Refusal:
    first = min(names, key=dot_natural_key)
    return Refusal(
        "E_CORRUPT", f"{len(names)} trunk tensors are missing, {first} first", "fetch the checkpoint again", 5
    )


def _integers(key: str, dtype: str) -> Refusal:
    return Refusal("E_QUANTISED", f"{key} is stored as {dtype}", "use the bf16 original of this model")


def load_trunk(model: Any, file: Path, dtype: torch.dtype) -> None:
    """Fill a meta model, experts already taken out, from the checkpoint's trunk tensors, as `from_pretrained` would.

    On the host; what needs no conversion stays in the mapped file, so that it takes no memory until it is copied.
    Also rebuilds what no file holds (rotary tables) and ties what is tied. Refuses where a parameter is missing.
    """
    load = LoadStateDictConfig(
        pretrained_model_name_or_path=str(file),
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
        device_map={"": torch.device("cpu")},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
    )
    try:
        with _ALONE:
            info, _ = type(model)._load_pretrained_model(model, None, [str(file)], load)
            info = type(model)._finalize_model_loading(model, load, info)
    except RuntimeError as error:
        what = f"{file} does not fit its config ({_first_line(error)})"
        raise Refusal("E_CORRUPT", what, "fetch a checkpoint that matches its config", 5) from error
    if info.missing_keys:
        raise _lacking(info.missing_keys)
    if info.mismatched_keys or info.error_msgs:
        raise Refusal(
            "E_CORRUPT",
            f"{file} does not match its config: {sorted(map(str, info.mismatched_keys))[:1]}",
            "fetch the checkpoint again",
            5,
        )
    model.eval()


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` was."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _stored(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors files, memory-mapped."""
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        check_bounds(file, "fetch it again")
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise Refusal(
                "E_CORRUPT", f"{file} is not a whole safetensors file ({error})", "fetch it again", 5
            ) from error
        found |= {key: Stored(handle, key) for key in handle.keys()}
    return found
