"""Checkpoints as people publish them, in MXFP4 and FP8: the truth is stock transformers with its own dequantisation, and
where that does not go (blocks that do not divide a side) a loop over single values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from duoserve import published
from duoserve.checkpoint import Checkpoint, read_config
from duoserve.convert import convert
from duoserve.core import Refusal
from duoserve.store import Store

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
OUTSIDE = ("embed_tokens", "lm_head", "norm", "mlp.gate.")  # what the hub's FP8 checkpoints leave as it is

Tensors = dict[str, torch.Tensor]


def load_all(folder: Path) -> Tensors:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def save(plain: Path, folder: Path, tensors: Tensors, quantization: Any, **config: Any) -> Path:
    """`tensors` in two shards with an index, beside the config of `plain`."""
    folder.mkdir()
    said = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization} | config
    if quantization is None:
        del said["quantization_config"]
    (folder / "config.json").write_text(json.dumps(said))
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def fp8(w: torch.Tensor, block: tuple[int, int] | None, scale: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix by a loop over its blocks: values and scales (scalar where `block` is None)."""
    rows, cols = block or tuple(w.shape)
    grid = torch.ones(-(-w.shape[0] // rows), -(-w.shape[1] // cols))
    q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            s = (w[at].float().abs().max() / 448).clamp_min(1e-12)
            if scale in (torch.uint8, torch.float8_e8m0fnu):
                s = torch.exp2(torch.ceil(torch.log2(s)))
            grid[i, j] = s.to(scale) if scale == torch.bfloat16 else s
            q[at] = (w[at].float() / grid[i, j]).to(torch.float8_e4m3fn)
    if scale == torch.uint8:
        return q, grid.to(torch.float8_e8m0fnu).view(torch.uint8)
    return q, (grid if block else grid[0, 0]).to(scale)


def unfp8(q: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Value by value."""
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - 127)
    q, scales = q.float(), scales.float()
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = q[i, j] * (scales[i // block[0], j // block[1]] if block else scales)
    return out


def publish_fp8(
    plain: Path, folder: Path, block: tuple[int, int] | None, scale: torch.dtype = torch.float32, **said: Any
) -> tuple[Path, Path]:
    """A toy in FP8 as the hub has it, and the same values in float32, unquantised."""
    quantised, wide = {}, {}
    for name, value in load_all(plain).items():
        if value.ndim != 2 or any(part in name for part in OUTSIDE):
            wide[name] = quantised[name] = value
            continue
        q, s = fp8(value, block, scale)
        quantised |= {name: q, f"{name}_scale_inv": s}
        if not block:
            quantised[name.removesuffix("weight") + "activation_scale"] = torch.tensor(1.0)
        wide[name] = unfp8(q, s, block)
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic" if block else "static"}
    how |= {"weight_block_size": list(block) if block else None} | said
    return save(plain, folder, quantised, how), save(plain, folder.with_name("wide"), wide, None)


def publish_mxfp4(plain: Path, folder: Path) -> tuple[Path, Path]:
    """A gpt_oss toy with its experts in MXFP4, random bytes, and the same values unquantised, by a loop."""
    generator = torch.Generator().manual_seed(3)
    quantised, wide = {}, {}
    for name, value in load_all(plain).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            wide[name] = quantised[name] = value
            continue
        n_experts, n_in, n_out = value.shape
        blocks = torch.randint(0, 256, (n_experts, n_out, n_in // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (n_experts, n_out, n_in // 32), generator=generator, dtype=torch.uint8)
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wide[name] = torch.empty(n_experts, n_in, n_out)
        for e in range(n_experts):
            for n in range(n_out):
                for k in range(n_in):
                    byte = int(blocks[e, n, k // 32, k % 32 // 2])
                    nibble = byte >> 4 if k % 2 else byte & 15
                    wide[name][e, k, n] = FP4[nibble] * 2.0 ** (int(scales[e, n, k // 32]) - 127)
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return save(plain, folder, quantised, how), save(plain, folder.with_name("wide"), wide, None)


@pytest.fixture(scope="module")
def gpt_oss(toy: Any, tmp_path_factory: Any) -> tuple[Path, Path]:
    plain = toy("gpt_oss", hidden_size=32, intermediate_size=32, num_local_experts=4)
    return publish_mxfp4(plain, tmp_path_factory.mktemp("mxfp4") / "quantised")


@pytest.fixture(scope="module")
def qwen3(toy: Any, tmp_path_factory: Any) -> tuple[Path, Path]:
    plain = toy("qwen3_moe", num_hidden_layers=1)
    return publish_fp8(plain, tmp_path_factory.mktemp("fp8") / "quantised", (32, 32))


@pytest.fixture(params=["mxfp4", "fp8"])
def pair(request: Any, gpt_oss: Any, qwen3: Any) -> tuple[Path, Path]:
    """A quantised checkpoint and the same values unquantised."""
    return gpt_oss if request.param == "mxfp4" else qwen3


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(toys.ids()).logits


def stock(folder: Path, how: Any) -> Any:
    """Its own dequantisation; transformers 5.17 leaves MXFP4 in bfloat16 (exact there), whatever was asked for."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).float().eval()


def same_as(wide: Path, quantised: Path, load: Callable[..., Any]) -> torch.Tensor:
    """The engine in float32 on the quantised checkpoint answers as the stock model on its values; returns the logits."""
    engine = load(quantised, dtype="float32", budget="half")
    got = logits(engine.model)
    assert relative(got, logits(toys.stock(wide))) <= 1e-5
    return got


def test_gpt_oss_in_mxfp4_equals_the_stock_model(gpt_oss: Any, load: Any) -> None:
    got = same_as(gpt_oss[1], gpt_oss[0], load)
    assert relative(got, logits(stock(gpt_oss[0], Mxfp4Config(dequantize=True)))) <= 1e-5


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_block_fp8_equals_the_stock_model(toy: Any, load: Any, tmp_path: Path, family: str) -> None:
    """Sides that blocks divide, which is as far as the stock dequantisation goes."""
    sizes = WIDE | {"q_lora_rank": 32, "kv_lora_rank": 16} if family == "deepseek_v3" else WIDE
    plain = toy(family, num_hidden_layers=2, **sizes)
    quantised, wide = publish_fp8(plain, tmp_path / "q", (16, 16))
    got = same_as(wide, quantised, load)
    how = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    assert relative(got, logits(stock(quantised, how))) <= 1e-5


@pytest.mark.parametrize(
    ("family", "block", "scale"),
    [
        ("deepseek_v3", (32, 32), torch.float32),
        ("qwen3_moe", (32, 32), torch.bfloat16),
        ("qwen3_moe", (128, 128), torch.float8_e8m0fnu),
        ("qwen3_moe", (32, 48), torch.uint8),
        ("qwen3_moe", None, torch.float32),
        ("qwen3_moe", None, torch.bfloat16),
    ],
    ids=str,
)
def test_any_block_and_any_scale(
    toy: Any, load: Any, tmp_path: Path, family: str, block: Any, scale: torch.dtype
) -> None:
    """Blocks that divide no side, larger than a side, one scale per tensor; trunk and shared experts are quantised too."""
    quantised, wide = publish_fp8(toy(family, num_hidden_layers=2), tmp_path / "q", block, scale)
    same_as(wide, quantised, load)


def test_experts_fused_in_one_tensor_are_read_one_by_one(tmp_path: Path) -> None:
    w_ERC = torch.randn(5, 40, 70, generator=torch.Generator().manual_seed(1))
    pairs = [fp8(w, (32, 32), torch.float32) for w in w_ERC]
    values, scales = torch.stack([q for q, _ in pairs]), torch.stack([s for _, s in pairs])
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        stored = {key: published.Stored(file, key) for key in file.keys()}
        (tensor,) = published.tensors(stored, published.Scheme("fp8", (32, 32))).values()
        for e in range(5):
            assert torch.equal(tensor.rows(e, e + 1)[0], unfp8(values[e], scales[e], (32, 32)))


def test_rows_in_small_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    w = torch.randn(70, 50, generator=torch.Generator().manual_seed(2))
    q, s = fp8(w, (32, 32), torch.float32)
    blocks = torch.randint(0, 256, (2, 30, 3, 16), dtype=torch.uint8)
    powers = torch.randint(100, 140, (2, 30, 3), dtype=torch.uint8)
    save_file({"w": q, "w_scale_inv": s, "x_blocks": blocks, "x_scales": powers}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        stored = {key: published.Stored(file, key) for key in file.keys()}
        first = {key: value for key, value in stored.items() if key[0] == "w"}
        w8 = published.tensors(first, published.Scheme("fp8", (32, 32)))["w"]
        x4 = published.tensors({k: stored[k] for k in ("x_blocks", "x_scales")}, published.Scheme("mxfp4"))["x"]
        whole = w8.whole(), x4.whole()
        monkeypatch.setattr(published, "AT_ONCE", 130)
        assert torch.equal(w8.whole(), whole[0]) and torch.equal(x4.whole(), whole[1])
        assert torch.equal(w8.rows(33, 65), whole[0][33:65]) and torch.equal(x4.rows(1, 2), whole[1][1:2])


def test_what_is_no_number_stays_so(qwen3: Any, tmp_path: Path) -> None:
    quantised = Path(shutil.copytree(qwen3[0], tmp_path / "q"))
    for file in quantised.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("experts.2.down_proj.weight"):
                tensors[name].view(torch.uint8)[3, 5] = 0x7F
                save_file(tensors, file)
    checkpoint = Checkpoint(quantised)
    got = checkpoint.expert(checkpoint.specs[0], "down_proj", 2)
    assert got.isnan().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_the_store_is_that_of_the_plain_values(toy: Any, gpt_oss: Any, tmp_path: Path, kind: str) -> None:
    """int4 experts byte for byte; the trunk in bf16 under plain names; a config that says nothing of quantisation."""
    if kind == "mxfp4":
        quantised, wide = gpt_oss
    else:
        quantised, wide = publish_fp8(toy("deepseek_v3"), tmp_path / "q", (32, 32))
    store, same = Store(convert(quantised, tmp_path / "a")), Store(convert(wide, tmp_path / "b"))
    for layer in store.layers:
        assert (store.folder / layer.file).read_bytes() == (same.folder / layer.file).read_bytes()
    got, want = load_file(store.trunk), load_file(same.trunk)
    assert set(got) == set(want) and not [name for name in got if "scale" in name]
    changed = {name for name in got if got[name].dtype != want[name].dtype}
    assert all(got[name].dtype == torch.bfloat16 for name in changed) and bool(changed) == (kind == "fp8")
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in got)
    raw = json.loads((store.folder / "config.json").read_text())
    assert raw == json.loads((wide / "config.json").read_text())
    assert not hasattr(read_config(store.folder), "quantization_config") and not list(store.verify())
    assert store.bf16_bytes == same.bf16_bytes
    store.close()
    same.close()


def test_int4_answers_are_those_of_the_plain_values(pair: Any, load: Any) -> None:
    quantised, wide = (logits(load(folder, format="int4", budget="half").model) for folder in pair)
    assert torch.equal(quantised, wide)


def test_no_more_than_one_expert_is_read_at_a_time(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}

    def counted(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(self: Any, *args: Any) -> torch.Tensor:
            value = method(self, *args)
            read[self.key] = max(read.get(self.key, 0), value.numel())
            return value

        return call

    monkeypatch.setattr(published.Stored, "part", counted(published.Stored.part))
    monkeypatch.setattr(published.Stored, "whole", counted(published.Stored.whole))
    convert(pair[0], tmp_path / "s")
    stored = load_all(pair[0])
    fused = {name: value for name, value in stored.items() if name.endswith(("_blocks", "_scales"))}
    single = {name: value for name, value in stored.items() if ".experts." in name and name.endswith("weight")}
    assert bool(fused) != bool(single)
    assert all(0 < read[name] <= value[0].numel() for name, value in fused.items())
    assert all(0 < read[name] <= value.numel() for name, value in single.items())


SAID = [
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"load_in_8bit": True}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
    ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    ({"quant_method": "torchao", "quant_type": {}}, "torchao"),
    ({"quant_method": "nvfp4"}, "nvfp4"),
    ({"quant_method": "fp8", "expert_dtype": "fp4", "weight_block_size": [128, 128]}, "fp4"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"\[128\]"),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"\[128, 0\]"),
    ({"quant_method": "fp8", "weight_block_size": "128x128"}, "128x128"),
    ({"quant_method": "fp8", "weight_block_size": [True, 128]}, "True"),
    ({"quant_method": None}, "None"),
    ({"quant_method": ["fp8"]}, "fp8"),
    ({"bits": 4, "group_size": 64}, "no quant_method, only bits, group_size"),
    ("fp8", "a str, not an object"),
    ([1], "a list, not an object"),
    (4, "a int, not an object"),
]


@pytest.mark.parametrize(("said", "named"), SAID, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
def test_other_quantisations_are_refused_by_name(toy: Any, tmp_path: Path, said: Any, named: str, nested: bool) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"text_config": {"quantization_config": said}} if nested else {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=rf"E_QUANTISED: .*{named}.*; use the bf16 original") as refusal:
        Checkpoint(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("said", [None, {}], ids=str)
def test_a_config_that_says_nothing_of_it_is_plain(toy: Any, tmp_path: Path, said: Any) -> None:
    folder = tmp_path / "m"
    shutil.copytree(toy("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).scheme is None


def drop(tensors: Tensors, end: str) -> None:
    del tensors[next(name for name in sorted(tensors) if name.endswith(end))]


def put(tensors: Tensors, end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = next(name for name in sorted(tensors) if name.endswith(end))
    tensors[name] = change(tensors[name])


BROKEN: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "scale missing": ("fp8", lambda t: drop(t, "down_proj.weight_scale_inv"), r"has no .*down_proj.weight_scale_inv"),
    "weight missing": ("fp8", lambda t: drop(t, "down_proj.weight"), "has no .*down_proj.weight beside"),
    "scale too small": ("fp8", lambda t: put(t, "up_proj.weight_scale_inv", lambda s: s[:1, :1].repeat(1, 2)[:, :2]),
                        r"has shape \(1, 2\) of F32, should be \(2, 2\)"),
    "scale of integers": ("fp8", lambda t: put(t, "up_proj.weight_scale_inv", lambda s: s.int()), "of I32, should be"),
    "weight in bf16": ("fp8", lambda t: put(t, "up_proj.weight", lambda w: w.bfloat16()), "of BF16, should be"),
    "weight in e5m2": ("fp8", lambda t: put(t, "up_proj.weight", lambda w: w.float().to(torch.float8_e5m2)),
                       "of F8_E5M2, should be"),
    "weight too small": ("fp8", lambda t: put(t, "experts.3.up_proj.weight", lambda w: w[:40]), "has shape"),
    "config without blocks": ("bare", lambda t: None, "should be"),
    "no config": ("none", lambda t: None, "stored as F8_E4M3"),
    "experts of integers": ("fp8", lambda t: put(t, "gate_proj.weight", lambda w: w.float().to(torch.int8)),
                            "of I8, should be"),
    "packed integers": ("none", lambda t: [put(t, name, lambda w: w.float().to(torch.int8)) for name in sorted(t)
                                           if t[name].dtype == torch.float8_e4m3fn], "stored as I8"),
    "mxfp4 scales missing": ("mxfp4", lambda t: drop(t, "gate_up_proj_scales"), "has no .*gate_up_proj_scales"),
    "mxfp4 blocks missing": ("mxfp4", lambda t: drop(t, "gate_up_proj_blocks"), "has no .*gate_up_proj_blocks"),
    "mxfp4 scales too few": ("mxfp4", lambda t: put(t, "gate_up_proj_scales", lambda s: s[:, 1:]), "should be"),
    "mxfp4 blocks flat": ("mxfp4", lambda t: put(t, "gate_up_proj_blocks", lambda b: b.flatten(2)), "should be"),
    "mxfp4 too few experts": ("mxfp4", lambda t: [put(t, f"layers.0.mlp.experts.gate_up_proj_{end}", lambda b: b[1:])
                                                  for end in ("blocks", "scales")], "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_belong_together_are_refused(gpt_oss: Any, qwen3: Any, tmp_path: Path, case: str) -> None:
    kind, change, match = BROKEN[case]
    how: Any = {"quant_method": "mxfp4" if kind == "mxfp4" else "fp8", "weight_block_size": [32, 32]}
    source = gpt_oss[0] if kind == "mxfp4" else qwen3[0]
    tensors = load_all(source)
    change(tensors)
    how = {"none": None, "bare": how | {"weight_block_size": None}}.get(kind, how)
    with pytest.raises(Refusal, match=f"E_(CORRUPT|QUANTISED): .*{match}") as refusal:
        Checkpoint(save(source, tmp_path / "m", tensors, how))
    assert "\n" not in str(refusal.value)
