"""A GGUF of a Mixtral checkpoint, so that llama.cpp can stand beside ours with the same weights.

    python -m benchmarks.gguf_file FOLDER FILE.gguf [--type q4_0]

Types: f32 or bf16, as the checkpoint has them; q4_0 is made of the latter by llama.cpp's own quantiser, as its users make
it. The file names no words, since tokens go in as numbers. Knows the names and the order that llama.cpp's `llama`
architecture wants; needs the packages gguf and llama-cpp-python.

    rotary pairs    transformers turns row i of a head with row i + half, llama.cpp neighbours: q and k are interleaved
    experts         one matrix an expert there, all experts of a layer in one tensor here
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig

TYPES = ("f32", "bf16", "q4_0")
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class Part(NamedTuple):
    """One tensor of the file: `sources` of the checkpoint, stacked if several; `heads` whose rows are interleaved."""

    name: str
    sources: tuple[str, ...]
    heads: int = 0


def make(checkpoint: Path, file: Path, type: str = "q4_0") -> Path:
    """Write `file`, all of it or nothing; one that is there is taken as it is."""
    if file.exists():
        return file
    whole = file.with_suffix(".part")
    if type == "q4_0":
        plain = file.with_suffix(".bf16.part")
        _write(checkpoint, plain, "bf16")
        _quantise(plain, whole)
        plain.unlink()
    else:
        _write(checkpoint, whole, type)
    os.replace(whole, file)
    return file


def _write(checkpoint: Path, file: Path, type: str) -> None:
    import gguf

    config, weights = AutoConfig.from_pretrained(checkpoint), _Weights(checkpoint)
    parts = list(_parts(config))
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, config)
    kinds = {4: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.BF16}
    widths = {part: 4 if type == "f32" or _is_small(part) else 2 for part in parts}
    for part, width in widths.items():
        shape = weights.shape(part)
        element = np.dtype(np.float32 if width == 4 else np.int16)
        writer.add_tensor_info(part.name, shape, element, width * math.prod(shape), raw_dtype=kinds[width])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, width in widths.items():
        data = weights.read(part)
        writer.write_tensor_data((data.float() if width == 4 else data.to(torch.bfloat16).view(torch.int16)).numpy())
    writer.close()


def _is_small(part: Part) -> bool:
    """Norms and routers, which llama.cpp wants in float32."""
    return "norm" in part.name or "ffn_gate_inp" in part.name


def _describe(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("no_vocab")


def _parts(config: Any) -> Iterator[Part]:
    yield Part("token_embd.weight", ("model.embed_tokens.weight",))
    yield Part("output_norm.weight", ("model.norm.weight",))
    if not config.tie_word_embeddings:
        yield Part("output.weight", ("lm_head.weight",))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for n in range(config.num_hidden_layers):
        here, there = f"model.layers.{n}", f"blk.{n}"
        for norm, name in _NORMS.items():
            yield Part(f"{there}.{name}.weight", (f"{here}.{norm}.weight",))
        for linear, name in _ATTENTION.items():
            yield Part(f"{there}.{name}.weight", (f"{here}.self_attn.{linear}.weight",), heads.get(linear, 0))
        yield Part(f"{there}.ffn_gate_inp.weight", (f"{here}.block_sparse_moe.gate.weight",))
        for linear, name in _EXPERTS.items():
            experts = range(config.num_local_experts)
            sources = tuple(f"{here}.block_sparse_moe.experts.{e}.{linear}.weight" for e in experts)
            yield Part(f"{there}.{name}.weight", sources)


class _Weights:
    """The checkpoint's tensors, one part at a time."""

    def __init__(self, folder: Path):
        self._files = {
            name: file
            for path in sorted(folder.glob("*.safetensors"))
            for file in [safe_open(path, framework="pt")]
            for name in file.keys()
        }

    def shape(self, part: Part) -> tuple[int, ...]:
        one = tuple(self._files[part.sources[0]].get_slice(part.sources[0]).get_shape())
        return one if len(part.sources) == 1 else (len(part.sources), *one)

    def read(self, part: Part) -> torch.Tensor:
        each = [self._files[name].get_tensor(name) for name in part.sources]
        data = each[0] if len(each) == 1 else torch.stack(each)
        return interleaved(data, part.heads) if part.heads else data


def interleaved(w_OD: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows i and i + half of every head become neighbours."""
    halves_H2RD = w_OD.unflatten(0, (heads, 2, -1))
    return halves_H2RD.transpose(1, 2).reshape(w_OD.shape).contiguous()


def _quantise(source: Path, target: Path) -> None:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    args = parser.parse_args()
    print(make(args.folder, args.file, args.type), args.file.stat().st_size)


if __name__ == "__main__":
    main()
