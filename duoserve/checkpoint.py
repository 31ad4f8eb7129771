"""The seam to transformers, and the only file that touches what transformers does not document.

Knows how a hub checkpoint is named and sharded, how transformers renames and fuses its tensors, and how a stock model is
built on the meta device with its routed experts taken out. Knows no formats, stores, slots or streams. Tested on
transformers 5.17 and on the newest: `LoadStateDictConfig`, `_load_pretrained_model`, `_finalize_model_loading`,
`get_model_conversion_mapping`, `rename_source_key` and `WeightConverter.convert` are private there and may move.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx.experimental._config as torch_shapes
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from duoserve.core import Refusal
from duoserve.headers import check_bounds, read_json

SIDE_FILES = re.compile(
    r"(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template.*)"
    r"\.(json|jinja|txt|model)|chat_template\.jinja|tokenizer\.model|.*\.tiktoken"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_WEIGHTS = 1 << 18  # tensors that an index names; the largest published models have some 100,000
_SAMPLED_TENSORS = 4096
_WHOLE_FILE = 64 << 20
_LEAST_PERIOD = 128  # tokens; no compressed cache joins more into one


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def quiet() -> None:
    """transformers' own progress bars and reports would break ours; its errors still rise."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder behind MODEL: a path, or a hub id downloaded (or found in the hub cache, offline) by huggingface_hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(model)
    if path.exists() or not _HUB_ID.fullmatch(name) or name.count("/") != 1:
        raise Refusal(
            "E_MODEL", f"no model folder {name!r} here", "give a checkpoint folder, an expert store or a hub id", 3
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"],
                ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in other layouts
            )
        )
    except Exception as error:  # the hub's many ways to say no, in one line
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise Refusal(
            "E_MODEL",
            f"{name!r} is no folder here and the hub gave no such model ({reason})",
            "check the name and the network",
            3,
        ) from error


def read_config(folder: Path) -> Any:
    """The stock config; refuses anything that would run code or that we cannot read."""
    path = folder / "config.json"
    if not path.is_file():
        raise Refusal(
            "E_MODEL", f"{folder} has no config.json", "give a checkpoint folder, an expert store or a hub id", 3
        )
    try:
        raw = read_json(path, "fetch the checkpoint again")
    except Refusal as refusal:
        raise refusal.under("E_CONFIG") from refusal
    if not isinstance(raw, dict):
        raise Refusal(
            "E_CONFIG", f"{path} holds a {type(raw).__name__}, not an object", "fetch the checkpoint again", 5
        )
    if "auto_map" in raw:
        raise Refusal(
            "E_REMOTE_CODE",
            f"{folder} wants to run its own code (auto_map)",
            "use a checkpoint that transformers knows",
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        kind = raw.get("model_type")
        raise Refusal(
            "E_CONFIG",
            f"transformers {transformers.__version__} cannot read the config of model type {kind!r}",
            "use a model type that it knows, or a newer transformers",
        ) from error


def build_meta(config: Any, dtype: torch.dtype) -> Any:
    """The stock model for `config` with every tensor on the meta device, in evaluation mode."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refusal(
            "E_CONFIG",
            f"model type {config.model_type!r} has no causal language model in transformers",
            "use a text-generation checkpoint",
        )
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # a family's code over a config that it does not expect: anything can come
        what = f"transformers {transformers.__version__} cannot build {config.model_type!r} ({_first_line(error)})"
        raise Refusal("E_CONFIG", what, "check config.json, or use a newer transformers") from error
    return model.eval()


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
        for name, p in spec.module.named_parameters(recurse=False):
            if p.ndim not in (2, 3) or p.shape[0] != spec.n_experts:
                raise Refusal(
                    "E_LAYOUT",
                    f"{spec.name}.{name} has shape {tuple(p.shape)}, not one row per expert ({spec.n_experts})",
                    "this family cannot be offloaded yet",
                )
    return specs


class Checkpoint:
    """A hub-layout folder of safetensors files, seen through transformers' conversion mapping.

    Tensors are memory-mapped; only what is asked for is read. `expert` gives one expert's share of one parameter.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        quantization = getattr(self.config, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
            raise Refusal(
                "E_QUANTISED", f"the checkpoint is quantised already ({method})", "use the bf16 original of this model"
            )
        self._at = _stored(folder)
        self.model = build_meta(self.config, self.dtype)
        self.specs = find_experts(self.model)
        self._plan()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes of the checkpoint are stored in."""
        sizes: dict[str, int] = {}
        for key in self._at:
            part = self._slice(key)
            n = 1
            for side in part.get_shape():
                n *= side
            sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + n
        names = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
        common = max(sizes, key=lambda name: sizes[name])
        if common not in names:
            raise Refusal(
                "E_QUANTISED", f"the checkpoint's weights are stored as {common}", "use a bf16, f16 or f32 checkpoint"
            )
        return names[common]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model: its config, its tensors' names and shapes, and their bytes (sampled where large)."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in _weight_files(self.folder):
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

    def side_files(self) -> list[Path]:
        """Config, generation config, tokenizer and chat template."""
        return [p for p in sorted(self.folder.iterdir()) if p.is_file() and SIDE_FILES.fullmatch(p.name)]

    def trunk(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of each checkpoint tensor that is no routed expert and that the model uses."""
        for key in self._trunk:
            part = self._slice(key)
            yield key, part.get_dtype(), tuple(part.get_shape())

    def tensor(self, key: str) -> torch.Tensor:
        return self._at[key].get_tensor(key)

    def total_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def expert(self, spec: ExpertsSpec, param: str, e: int, wanted: torch.dtype | None = None) -> torch.Tensor:
        """One expert's share of one parameter, shaped as in `spec.parameters`, in the checkpoint's dtype, or `wanted`."""
        target = f"{spec.name}.{param}"
        sources = self._experts[target]
        if None in sources:  # stored fused, under the same name
            return self._slice(sources[None][0])[e : e + 1][0].to(wanted)
        converter = copy.deepcopy(self._converter[next(iter(sources))])
        for pattern, keys in sources.items():
            part = self.tensor(keys[e]) if len(keys) > 1 else self._slice(keys[0])[e : e + 1]
            part = part.to(wanted)  # narrower before tensors are joined, which takes their size once more
            converter.add_tensor(target, keys[0], pattern, cast(Any, lambda part=part: part))
            del part
        value = converter.convert(target, model=self.model, config=self.config)[target]
        value = value[0] if isinstance(value, list) else value
        return value[0]

    def _slice(self, key: str) -> Any:
        return self._at[key].get_slice(key)

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
        for key in sorted(self._at, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], self.model.base_model_prefix, known)
            if name in targets:
                self._experts.setdefault(name, {}).setdefault(pattern, []).append(key)
            else:
                (self._trunk if name in known else self.ignored).append(key)
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
        self._check_shapes(known)

    def _check_shapes(self, known: dict[str, Any]) -> None:
        """Every tensor has the shape that the config says; from headers alone, but for one expert per kind of layer."""
        kinds: dict[Any, tuple[str, list[tuple[int, ...]]]] = {}
        for spec in self.specs:
            for param, shape in spec.parameters.items():
                sources = self._experts[f"{spec.name}.{param}"]
                stored = [tuple(self._slice(key).get_shape()) for keys in sources.values() for key in keys]
                if (param, shape) not in kinds:
                    self._same(f"{spec.name}.{param} of one expert", tuple(self.expert(spec, param, 0).shape), shape)
                    kinds[param, shape] = spec.name, stored
                for got, want in zip(stored, kinds[param, shape][1], strict=False):
                    self._same(f"a tensor of {spec.name}.{param}", got, want)
        for key, name in self._plain_trunk.items():
            self._same(key, tuple(self._slice(key).get_shape()), tuple(known[name].shape))

    @staticmethod
    def _same(what: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
        if got != want:
            raise Refusal(
                "E_CORRUPT",
                f"{what} has shape {got}, should have {want}",
                "fetch a checkpoint that matches its config",
                5,
            )


def load_trunk(model: Any, file: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a meta model, experts already taken out, from the checkpoint's trunk tensors, as `from_pretrained` would.

    Also rebuilds what no file holds (rotary tables) and ties what is tied. Refuses where a parameter is missing.
    """
    load = LoadStateDictConfig(
        pretrained_model_name_or_path=str(file),
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
    )
    try:
        info, _ = type(model)._load_pretrained_model(model, None, [str(file)], load)
        info = type(model)._finalize_model_loading(model, load, info)
    except RuntimeError as error:
        raise Refusal(
            "E_CORRUPT", f"{file} does not fit its config", "fetch a checkpoint that matches its config", 5
        ) from error
    if info.missing_keys:
        missing = sorted(info.missing_keys)
        raise Refusal(
            "E_CORRUPT",
            f"{len(missing)} trunk tensors are missing, {missing[0]} first",
            "fetch the checkpoint again",
            5,
        )
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


def tensor_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers of a meta model once loaded, tied ones once, what must stay float32 as such."""
    plan = {re.compile(_glob(pattern)): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    total, seen = 0, set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = next((d for pattern, d in plan.items() if pattern.search(name)), tensor.dtype)
            total += tensor.numel() * (kept if tensor.is_floating_point() else tensor.dtype).itemsize
    return total


def _glob(pattern: str) -> str:
    return pattern.replace("*", ".*")


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of cache after `tokens` tokens of one sequence, by running the meta model: exact for any attention.

    Where the model cannot run on meta: a bound, as if every layer kept keys and values of every attention head.
    `model` must be on meta with its experts replaced by something that runs there.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    text = model.config.get_text_config(decoder=True)
    try:  # the cache that `generate` would make; indexers ask for the non-zeros of a mask, which has none on meta
        cache = transformers.DynamicCache(config=text) if model._supports_default_dynamic_cache() else None
        with torch.no_grad(), torch_shapes.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache_bytes(out.past_key_values)
    except Refusal:
        raise
    except Exception:
        return _kv_bound(text.to_dict(), tokens, model.dtype)


def _kv_bound(text: dict[str, Any], tokens: int, dtype: torch.dtype) -> int:
    head = max((side for name, side in text.items() if name.endswith("head_dim") and isinstance(side, int)), default=0)
    width = max(int(text["hidden_size"]), int(text["num_attention_heads"]) * head)
    return 2 * int(text["num_hidden_layers"]) * width * tokens * dtype.itemsize


def kv_period(config: Any) -> int:
    """Tokens after which a cache has seen every window and block: from there on each period adds the same."""
    text = config.get_text_config().to_dict()
    sides = [side for name, side in text.items() if re.search("window|chunk|block_size", name) and type(side) is int]
    return -(-max([1, *sides]) // _LEAST_PERIOD) * _LEAST_PERIOD


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers cache holds in tensors: keys and values, index keys, states of linear attention."""
    held = [tensor for part in (cache, *getattr(cache, "layers", ())) for tensor in _tensors(vars(part))]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in held}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def model_limit(config: Any) -> int | None:
    """The longest context the model was made for, where its config says."""
    text = config.get_text_config()
    return cast("int | None", getattr(text, "max_position_embeddings", None))


def _stored(folder: Path) -> dict[str, Any]:
    """For each tensor of a folder's safetensors files the open file that has it, memory-mapped."""
    found: dict[str, Any] = {}
    for file in _weight_files(folder):
        check_bounds(file, "fetch it again")
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise Refusal(
                "E_CORRUPT", f"{file} is not a whole safetensors file ({error})", "fetch it again", 5
            ) from error
        found |= dict.fromkeys(handle.keys(), handle)
    return found


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(read_json(index, "fetch it again", max_values=MAX_WEIGHTS)["weight_map"].values()))
        except Refusal:
            raise
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise Refusal("E_CORRUPT", f"{index} is not a shard index ({error!r})", "fetch it again", 5) from error
        bad = [n for n in names if not isinstance(n, str) or os.path.basename(n) != n or not n.endswith(".safetensors")]
        if bad:
            raise Refusal(
                "E_CORRUPT", f"{index} names {bad[0]!r}, which is no file of this folder", "fetch it again", 5
            )
        if not names:
            raise Refusal("E_CORRUPT", f"{index} names 0 shards", "fetch it again", 5)
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise Refusal(
                "E_CORRUPT",
                f"{len(missing)} of {len(names)} shards are missing, {missing[0]} first",
                "fetch them again",
                5,
            )
        return [folder / n for n in names]
    if single.is_file():
        return [single]
    raise Refusal(
        "E_MODEL",
        f"{folder} has no model.safetensors (other weight formats can run code when loaded)",
        "use a safetensors checkpoint",
        3,
    )
