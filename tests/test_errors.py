"""Every error that a user can meet, triggered for real: its code, its exit status, one line, its numbers, what to do.

A new code needs an entry in CASES and a row in docs/errors.md; two tests say so.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
from guessers import Dice
from mishaps import (
    INDEX,
    SMALL,
    TOOL,
    Kit,
    Strange,
    busy,
    calibrated,
    capped,
    changed_set,
    cut,
    few_modules,
    first_touch,
    flip,
    generation,
    loads,
    manifest,
    narrowed,
    nested,
    no_number,
    processor,
    raises_eio,
    raises_enospc,
    raises_type_error,
    recorded,
    traced,
    weights,
    with_folder,
    without_accelerate,
    without_bitsandbytes,
    without_gguf,
    without_room,
)

import duoserve
from dep_extension.kernel_table import here
from duoserve import codec, peers, prompts, repl, results, settings, shelf, shelving, tracing
from duoserve import serving as serving_
from duoserve.api.grammar import check_schema, mask_for
from duoserve.api.tools import check_tools, prepare
from duoserve.config import EngineConfig, parse_share
from duoserve.convert import convert
from duoserve.core import Refusal
from duoserve.future import Future
from duoserve.kernels import kernels
from duoserve.needs import count_passes
from duoserve.outlook import look
from duoserve.profile import read_profile
from duoserve.remote import Server
from duoserve.runfile import read_run
from predictor.load import load_folder
from traces.store import Traces

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "errors.md"
PACKAGES = ("duoserve", "traces", "predictor", "dep_extension")

CASES: list[tuple[str, str, int, str, Callable[[Kit], Any]]] = [
    # code, what, exit status, what the line must say, how to get there
    ("E_SIZE", "ram that is no size", 2, r"ram 'lots' is not a size; .*6GiB", lambda k: look(k.toy("mixtral"), ram="lots")),
    ("E_SIZE", "a budget that is no size", 2, r"budget 'six' .*6GiB", lambda k: EngineConfig(budget="six")),
    ("E_SIZE", "a share of nothing", 2, r"'0%' is not a share; .*15%", lambda k: parse_share("0%")),
    ("E_COUNT", "a context in words", 2, r"ctx 'many' .*4096 or 32k", lambda k: EngineConfig.of(ctx="many")),
    ("E_CTX", "a context of nothing", 2, r"of 0 tokens .*at least 1", lambda k: EngineConfig(ctx=0)),
    ("E_PREDICTOR_MODEL", "a predictor of another model", 2, r"for model 0123, this is [0-9a-f]{32}; train",
     lambda k: k.load().predict(Dice(6, fingerprint="0123"))),
    ("E_OPTION", "a policy that guesses nothing", 2, r"'lru' asks 0 predictors; leave",
     lambda k: duoserve.load(k.toy("mixtral"), policy="lru", predictor="gate")),
    ("E_OPTION", "a policy that asks nobody", 2, r"asks 0 predictors, 'dice' is given; take",
     lambda k: k.load(policy="lfp").predict(Dice(6))),
    ("E_OPTION", "the future without a recording", 2, r"'belady' .* 0 recorded passes are given; replay",
     lambda k: k.load(policy="belady")),
    ("E_OPTION", "a future for who does not look", 2, r"a future of 0 turns is given, this policy looks at 0; take",
     lambda k: k.load().foresee(Future([32] * 6, ()))),
    ("E_OPTION", "another model's future", 2, r"of layers with \[5\] experts, the model has \[32, .*; record",
     lambda k: k.load().foresee(Future([5], ()))),
    ("E_OPTION", "slots that are no number", 2, r"slots 'few' is not a number of slots; write it like 16, or top-k",
     lambda k: EngineConfig(slots="few")),
    ("E_OPTION", "an unknown policy", 2, r"'lfu'; did you mean 'lru'", lambda k: EngineConfig(policy="lfu")),
    ("E_SIZE", "a link of no size", 2, r"link 'fast' is not a size; write", lambda k: EngineConfig(link="fast")),
    ("E_OPTION", "an unknown option", 2, r"'budjet'; did you mean 'budget'", lambda k: EngineConfig.of(budjet="1")),
    ("E_OPTION", "an unknown format", 2, r"'int5'; did you mean 'int4'", lambda k: EngineConfig(format="int5")),
    ("E_OPTION", "an unknown dtype", 2, r"'bfloat61'; did you mean 'bfloat16'", lambda k: EngineConfig(dtype="bfloat61")),
    ("E_OPTION", "an unknown device", 2, r"'gpu'.* auto, cpu, cuda", lambda k: EngineConfig(device="gpu")),
    ("E_PORT", "a port that another listens on", 2, r"127.0.0.1 port \d+ cannot be listened on .*--port",
     lambda k: k.port()),
    ("E_OPTION", "a server for others without a key", 2, r"--host 0.0.0.0 is reached by others, and 0 keys .*--api-key",
     lambda k: serving_._check_key("0.0.0.0", None)),
    ("E_OPTION", "a key that is a word", 2, r"API key has 5 characters; give 8",
     lambda k: serving_._check_key("::1", "short")),
    ("E_URL", "no address", 2, r"'nowhere' is no address of a server; .*http://", lambda k: Server("nowhere")),
    ("E_URL", "nothing answers", 3, r"nothing answers at http://127.0.0.1:9; start", lambda k: Server("http://127.0.0.1:9")),
    ("E_DEVICE", "no GPU", 7, r"0 found.*--device cpu", lambda k: duoserve.load(device="cuda")),
    ("E_MODEL", "no such folder", 3, r"no model folder './nowhere' here; give", lambda k: look("./nowhere")),
    ("E_MODEL", "a hub id that the hub does not know", 3, r"'org/none' .*\(401\); .*hf auth login",
     lambda k: look(k.hub("org/none"))),
    ("E_OFFLINE", "a hub id that is not cached", 3, r"nobody/nothing is no folder .*HF_HUB_OFFLINE\); unset it",
     lambda k: look("nobody/nothing")),
    ("E_OFFLINE", "a model to load that is not cached", 3, r"nobody/nothing .*HF_HUB_OFFLINE\); unset it",
     lambda k: k.load("nobody/nothing")),
    ("E_HUB", "a hub that fails", 3, r"answered 500 for org/down; try again later", lambda k: look(k.hub("org/down"))),
    ("E_GATED", "a model behind a gate", 3, r"org/gated is gated; ask for access", lambda k: look(k.hub("org/gated"))),
    ("E_REVISION", "no such revision", 3, r"has org/toy, .*\(org/toy@v9\); give a branch",
     lambda k: look(k.hub("org/toy@v9"))),
    ("E_MODEL", "an empty folder", 3, r"has no config.json; give", lambda k: k.load(k.folder())),
    ("E_MODEL", "weights that can run code", 3, r"no model.safetensors and no .*, only 1 \.bin; use",
     lambda k: k.load(k.folder(config__json=(k.toy("mixtral") / "config.json").read_bytes(), pytorch_model__bin=b""))),
    ("E_CONFIG", "a config that is no JSON", 5, r"is not JSON .*char 1.*again", lambda k: look(k.folder(config__json=b"{"))),
    ("E_MODEL", "a file for a folder", 3, r"model.gguf' is a file, not a folder; give",
     lambda k: k.load(str(k.folder(model__gguf=b"GGUF") / "model.gguf"))),
    ("E_MODEL", "a name of nothing", 3, r"name of 0 characters; .*leave it out", lambda k: look("")),
    ("E_MODEL", "a folder whose name is no text", 3, r"not UTF-8 at character \d+; rename",
     lambda k: look(shutil.copytree(k.toy("mixtral"), os.fsdecode(os.fsencode(k.tmp) + b"/\xff")))),
    ("E_CONFIG", "more choices than experts", 5, r"choose 9 of 6 experts; fetch",
     lambda k: look(k.checkpoint(num_experts_per_tok=9))),
    ("E_CONFIG", "a generation config that is a list", 5, r"generation_config.json cannot be used \(.*; correct",
     lambda k: k.load(generation(k, []))),
    ("E_CONFIG", "a config that is a list", 5, r"holds a list.*again", lambda k: look(k.folder(config__json=[1]))),
    ("E_CONFIG", "a model type from the future", 2, r"5\.\d+.*'gpt9'; .*newer transformers",
     lambda k: look(k.folder(config__json={"model_type": "gpt9"}))),
    ("E_CONFIG", "a model of pictures", 2, r"'vit' has no causal language model .*; use a text",
     lambda k: look(k.folder(config__json={"model_type": "vit"}))),
    ("E_CONFIG", "a size below nothing", 2, r"cannot build 'mixtral' .*-64.*; check config.json",
     lambda k: look(k.folder(config__json=SMALL | {"model_type": "mixtral", "vocab_size": -64}))),
    ("E_CONFIG", "layers beyond reason", 5, r"num_hidden_layers 1000000000, at most 1,024 are built; fetch",
     lambda k: look(k.checkpoint(num_hidden_layers=10**9))),
    ("E_CONFIG", "experts beyond reason, further in", 5, r"n_routed_experts 1000000000, at most 65,536 are built; fetch",
     lambda k: look(k.checkpoint(text_config=[{"n_routed_experts": 10**9}]))),
    ("E_CONFIG", "a side beyond reason", 2, r"cannot build 'mixtral' .*1000000000000.*; check config.json",
     lambda k: look(k.checkpoint(hidden_size=10**12))),
    ("E_CONFIG", "modules beyond reason", 2, r"cannot build 'mixtral' \(more than 40 modules\); check config.json",
     lambda k: look(few_modules(k))),
    ("E_REMOTE_CODE", "a model with its own code", 2, r"auto_map.*; use a checkpoint",
     lambda k: look(k.folder(config__json={"auto_map": {"AutoModel": "x.Y"}}))),
    ("E_NOT_MOE", "a dense model", 2, r"'llama' has 0 routed experts; run it with transformers",
     lambda k: look(k.folder(config__json=SMALL | {"model_type": "llama"}))),
    ("E_KERNELS", "a table that is not there", 3, r"nowhere.json: No such file or directory; run `duoserve dep kernels",
     lambda k: duoserve.load(kernels="nowhere.json")),
    ("E_KERNELS", "a table of nothing", 2, r"is no table of kernels \(.*\): measure it again; run `duoserve dep kernels",
     lambda k: duoserve.load(kernels=str(k.folder(table__json={}) / "table.json"))),
    ("E_KERNELS", "another machine's table", 2, r"measured on 'there', this is '.*; run `duoserve dep kernels",
     lambda k: duoserve.load(kernels=k.kernel_table("there"))),
    ("E_KERNELS", "a table of another model", 3, r"has 1 shapes .*, not 64x192 x 6 float32: .*; run `duoserve dep kernels",
     lambda k: duoserve.load(k.toy("mixtral"), dtype="float32", cache_dir=str(k.tmp), kernels=k.kernel_table(here()))),
    ("E_OPTION", "a table measured for no time", 2, r"--seconds 0 is not between 0 and 3600; leave",
     lambda k: kernels(seconds=0.0)),
    ("E_LAYOUT", "a family without the seam", 2, r"'jetmoe' .*; use a family",
     lambda k: look(k.folder(config__json=SMALL | {"model_type": "jetmoe", "kv_channels": 16, "num_local_experts": 4}))),
    ("E_QUANTISED", "weights quantised elsewhere", 2, r"awq.*; use",
     lambda k: k.load(k.checkpoint(quantization_config={"quant_method": "awq", "bits": 4}))),
    ("E_QUANTISED", "integers for weights", 2, r"stored as I8; use",
     lambda k: k.load(weights(k, lambda t: t.update({n: v.char() for n, v in t.items()})))),
    ("E_CORRUPT", "a truncated shard", 5, r"not a whole safetensors file.*again",
     lambda k: k.load(k.harmed_shard(lambda file: cut(file, 10)))),
    ("E_CORRUPT", "a missing shard", 5, r"1 of \d+ shards are missing, model-0.* first; fetch",
     lambda k: k.load(k.harmed_shard(Path.unlink))),
    ("E_CORRUPT", "weights that are no numbers", 5, r"1 of [\d,]+ values of .*down_proj of expert 0 are no finite",
     lambda k: convert(weights(k, no_number), k.tmp / "out")),
    ("E_CORRUPT", "an index that is none", 5, r"is not a shard index .*again",
     lambda k: look(k.folder(config__json={"model_type": "mixtral"}, x__safetensors=b"", **{INDEX: [1]}))),
    ("E_CORRUPT", "an index that leaves its folder", 5, r"'\.\./x\.safetensors', which is no file",
     lambda k: look(k.folder(config__json={"model_type": "mixtral"}, x__safetensors=b"",
                             **{INDEX: {"weight_map": {"a": "../x.safetensors"}}}))),
    ("E_CORRUPT", "an index of nothing", 5, r"names 0 shards; fetch",
     lambda k: look(k.folder(config__json={"model_type": "mixtral"}, x__safetensors=b"", **{INDEX: {"weight_map": {}}}))),
    ("E_CORRUPT", "an expert too few", 5, r"needs 6 experts, the checkpoint has 5",
     lambda k: k.load(weights(k, lambda t: t.pop(next(n for n in t if "experts.3" in n))))),
    ("E_CORRUPT", "a tensor of another shape", 5, r"has shape \(\d+, 8\), should have",
     lambda k: k.load(weights(k, lambda t: narrowed(t, "q_proj.weight")))),
    ("E_CORRUPT", "a trunk tensor that is missing", 5, r"1 trunk tensors are missing, .*q_proj.* first; fetch",
     lambda k: k.load(weights(k, lambda t: t.pop(next(n for n in t if "q_proj" in n))))),
    ("E_TOKENIZER", "a tokenizer that cannot be read", 5, r"cannot be read.*again",
     lambda k: [(c := k.checkpoint()), (c / "tokenizer.json").write_text("{")] and k.load(c)),
    ("E_TOKENIZER", "text without a tokenizer", 3, r"0 tokenizer files; pass input_ids",
     lambda k: k.load(k.toy("mixtral")).generate("x")),
    ("E_STORE", "a folder that is no store", 3, r"has no manifest; give", lambda k: shelving.verify(k.tmp)),
    ("E_STORE", "a manifest that is no JSON", 5, r"is not JSON.*convert",
     lambda k: look(k.store(lambda s: (s / "manifest.json").write_text("{") and None))),
    ("E_STORE", "another program's manifest", 5, r"not the manifest of an expert store; convert",
     lambda k: look(k.store(lambda s: manifest(s, kind="cake")))),
    ("E_STORE", "a store from the future", 5, r"version 99, this program reads \d+; convert",
     lambda k: look(k.store(lambda s: manifest(s, version=99)))),
    ("E_STORE", "a manifest beyond reason", 5, r"has 67,108,865 bytes, at most [\d,]+ are read; convert",
     lambda k: look(k.store(lambda s: os.truncate(s / "manifest.json", (64 << 20) + 1)))),
    ("E_CORRUPT", "a changed manifest", 5, r"sha256 differs.*convert",
     lambda k: look(k.store(lambda s: manifest(s, bf16_bytes=1)))),
    ("E_STORE", "a truncated layer", 5, r"has \d+ bytes, the manifest says \d+; convert",
     lambda k: look(k.store(lambda s: cut(s / "experts-000.safetensors", 1)))),
    ("E_CORRUPT", "a flipped bit in a header", 5, r"has checksum [0-9a-f]{8}, written was [0-9a-f]{8}; convert",
     lambda k: look(k.store(lambda s: flip(s / "experts-000.safetensors", 20)))),
    ("E_CORRUPT", "a flipped bit in an expert", 5, r"expert 0 in .*has checksum .{8}, written was .{8}; check", first_touch),
    ("E_CORRUPT", "a store that does not verify", 5, r"1 of the store's parts .*; convert",
     lambda k: shelving.verify(k.store(lambda s: flip(s / "trunk.safetensors", 5000)))),
    ("E_STRAY", "a file beside the store's", 5, r"extra\.json is no part of this store.*; remove it",
     lambda k: look(k.store(lambda s: (s / "extra.json").write_text("{}") and None))),
    ("E_NAME", "a store that is not there", 3, r"none of 0 stores .* 'x'; see", lambda k: shelf.choose([], ["x"])),
    ("E_NAME", "a name of several stores", 2, r"'mix' could be 2 stores: .*; write more",
     lambda k: shelf.choose(shelf.on_shelf(k.shelf()), ["mix"])),
    ("E_NAME", "a store with a folder in it", 2, r"holds the folder 'photos', .*; remove it by hand", with_folder),
    ("E_CONFIRM", "a removal that nobody confirmed", 2, r"2 stores \(.*\) would be removed, 0 confirmed; add --yes",
     lambda k: k.command("rm", "--all", "--cache-dir", str(k.shelf().parent))),
    ("E_BUSY", "a store that is being made", 2, r"mixtral-aa-int4 is being made by process \d+; wait", busy),
    ("E_FORMAT", "another format than the store's", 2, r"is int4, asked was bf16; convert",
     lambda k: k.load(k.store(), format="bf16")),
    ("E_EXISTS", "a folder with another store", 2, r"holds another store \(int4 of .* bf16 of .*\); give an empty",
     lambda k: convert(k.toy("mixtral"), k.store(), "bf16")),
    ("E_EXISTS", "a folder that is not empty", 2, r"is not empty .*; give an empty",
     lambda k: [(k.tmp / "diary.txt").write_text("dear")] and convert(k.toy("mixtral"), k.tmp)),
    ("E_DISK", "a disk without room", 6, r"needs [\d,]+ bytes more, 1,000 are free .*; free",
     lambda k: convert(k.toy("mixtral"), without_room(k) / "out")),
    ("E_DISK", "a disk that became full", 6, r"No space left.*; free some space and run it again", raises_enospc),
    ("E_IO", "a disk that fails", 1, r"Input/output error.*; check the disk", raises_eio),
    ("E_IO", "a folder that cannot be written", 2, r"/proc/.*; give a folder that can be written",
     lambda k: k.command("convert", str(k.toy("mixtral")), "-o", "/proc/self/status/store")),
    ("E_NF4", "nf4 without bitsandbytes", 2, r"not installed; pip install bitsandbytes",
     lambda k: convert(k.toy("mixtral"), without_bitsandbytes(k) / "out", "nf4")),
    ("E_BUDGET", "a budget too small", 4, r"\(1,000 bytes\).*smallest is .* bytes\); raise --budget",
     lambda k: k.load(k.toy("mixtral"), budget=1000)),
    ("E_BUDGET", "too small, planned", 4, r"\(1,000 bytes\).*smallest is .* bytes\); raise --budget",
     lambda k: look(k.toy("mixtral"), budget=1000)),
    ("E_MEMORY", "a plan beyond memory", 4, r"takes .* KiB, 97\.7 KiB are free; lower",
     lambda k: look(k.toy("mixtral"), budget="1GiB", ram=100_000)),
    ("E_PROFILE", "no machine profile", 3, r"no machine profile .*; run `duoserve doctor`",
     lambda k: read_profile(k.tmp / "machine.json")),
    ("E_PROFILE", "a broken machine profile", 5, r"is no machine profile .*; run `duoserve doctor` again",
     lambda k: read_profile(k.folder(machine__json={"version": 2}) / "machine.json")),
    ("E_ESTIMATE", "a model that does not run on meta", 2, r"'strange' .*; measure", lambda k: count_passes(Strange(), 4)),
    ("E_PROMPT", "an empty prompt", 2, r"0 tokens; write at least one word", lambda k: k.load().generate("")),
    ("E_CTX", "a prompt longer than the context", 4, r"has \d+ tokens, the context 8; shorten",
     lambda k: k.load(ctx=8).generate("one two three four five six seven eight nine ten")),
    ("E_PROMPTS", "a prompt set that nobody shipped", 3, r"no prompts 'poetry' come .*; known: all, prose, code, questions",
     lambda k: prompts.prompt_set("poetry")),
    ("E_PROMPTS", "a shipped prompt set that was changed", 5, r"prose\.jsonl has sha256 .*; install", changed_set),
    ("E_RESULTS", "results that are not there", 3, r"there is no .*/none; give", lambda k: results.read(k.tmp / "none")),
    ("E_RESULTS", "results of another program", 5, r"r\.jsonl:1 is no row of results .*; give",
     lambda k: results.read(k.folder(r__jsonl=b'{"build_commit": "b1"}') / "r.jsonl")),
    ("E_RESULTS", "results that are no JSON", 5, r"r\.jsonl:1 is not JSON .*; give",
     lambda k: results.read(k.folder(r__jsonl=b"{") / "r.jsonl")),
    ("E_CAP", "a memory cap without root", 2, r"cap of 900\.0 MiB .* user 1000 cannot make; run as root", capped),
    ("E_OPTION", "an unknown peer", 2, r"'vllm'; .*stock, accelerate", lambda k: k.command("bench", "--peers", "vllm")),
    ("E_OPTION", "llama.cpp without a file", 2, r"'llama.cpp' has 0 GGUF files; name .* --gguf FILE", without_gguf),
    ("E_MODEL", "a GGUF that is none", 3, r"bench\.gguf is no GGUF: it begins with b'{\\n  '; name",
     lambda k: peers.chosen("llama.cpp", k.folder(bench__gguf=b"{\n  }") / "bench.gguf")),
    ("E_MODEL", "a GGUF that is not there", 3, r"/none cannot be read \(No such file or directory\); name",
     lambda k: k.command("bench", "--peers", "all", "--gguf", str(k.tmp / "none"))),
    ("E_OPTION", "a peer that is not installed", 2, r"'accelerate' is not installed; pip install", without_accelerate),
    ("E_OPTION", "an unknown policy to compare", 2, r"'lfu'; did you mean 'lru'",
     lambda k: k.command("bench", "--policies", "duoserve,lfu")),
    ("E_SIZE", "more residency than experts", 2, r"residency 150% is more than 100%; write",
     lambda k: k.command("bench", "--residency", "150%")),
    ("E_OPTION", "a batch of none", 2, r"batch '0' is not between 1 and 1024; give",
     lambda k: k.command("bench", "--batch", "1,0")),
    ("E_OPTION", "nothing to run", 2, r"0 policies and 0 peers are to be run; name",
     lambda k: k.command("bench", "--policies", "none")),
    ("E_OPTION", "peers of an expert store", 2, r"1 peers cannot load .*, an expert store; give",
     lambda k: k.command("bench", str(k.store()), "--peers", "stock", "--limit-tokens", "8")),
    ("E_PROMPTS", "prompts that are not there", 3, r"there is no .*/none; give",
     lambda k: tracing.read_prompts(k.tmp / "none")),
    ("E_PROMPTS", "a folder without prompts", 2, r"holds 0 prompts in 0 files; give", lambda k: tracing.read_prompts(k.tmp)),
    ("E_PROMPTS", "a line that is no prompt", 2, r"a\.jsonl:2 has 0 prompts; give",
     lambda k: tracing.read_prompts(k.folder(a__jsonl=b'{"text": "x"}\n{"txt": "x"}') / "a.jsonl")),
    ("E_PROMPTS", "a line that is no JSON", 5, r"a\.jsonl:1 is not JSON .*; give",
     lambda k: tracing.read_prompts(k.folder(a__jsonl=b"{") / "a.jsonl")),
    ("E_PROMPTS", "prompts that are no text", 2, r"a\.txt is not UTF-8 at byte 3; give",
     lambda k: tracing.read_prompts(k.folder(a__txt=b"caf\xe9"))),
    ("E_PROMPTS", "prompts in another kind of file", 2, r"a\.csv is none of \.jsonl, \.txt, \.md; give",
     lambda k: tracing.read_prompts(k.folder(a__csv=b"x") / "a.csv")),
    ("E_EXISTS", "a trace into a full folder", 2, r"is not empty \(1 files\); give an empty",
     lambda k: k.command("trace", "--prompts", str(k.folder(a__txt=b"x") / "a.txt"), "-o", str(k.tmp / "model"))),
    ("E_CTX", "a traced prompt beyond the context", 4, r"prompt 'a' has \d+ tokens, the context 8; cut",
     lambda k: traced(k, "one two three four five six seven eight nine ten", ctx=8)),
    ("E_CTX", "a traced batch beyond the context", 4, r"9 prompts of up to \d tokens with \d new ones .* of 8; lower",
     lambda k: traced(k, "a", ctx=8)),
    ("E_PREDICTOR", "a folder that is no predictor", 3, r"holds no predictor\.json; give a folder that `duoserve train`",
     lambda k: load_folder(k.tmp / "nothing")),
    ("E_PREDICTOR", "a predictor from the future", 5, r"version 9, this program reads 1; train it again",
     lambda k: load_folder(k.folder(predictor__json={"version": 9}))),
    ("E_TRACE", "a folder that is no trace", 3, r"holds no trace\.json; give",
     lambda k: k.command("trace-stats", str(k.tmp))),
    ("E_TRACE", "a trace from the future", 5, r"version 9, this program reads \d+; record",
     lambda k: Traces(k.folder(trace__json={"schema": 9}))),
    ("E_RUN", "a run that is not there", 3, r"there is no .*/none; record one", lambda k: read_run(k.tmp / "none")),
    ("E_RUN", "a run from the future", 5, r"run\.json is no recorded run .*; record one",
     lambda k: read_run(k.folder(run__json={"kind": "duoserve-run", "version": 9}) / "run.json")),
    ("E_OPTION", "a pass that was not recorded", 2, r"--step 3 of 0 passes; count from 0",
     lambda k: k.command("timeline", str(recorded(k)), "--step", "3")),
    ("E_OPTION", "a time beyond the run", 2, r"from 5000 to 6000 ms of a run of 1000 ms; give",
     lambda k: k.command("timeline", str(recorded(k)), "--from", "5000", "--to", "6000")),
    ("E_IO", "a recording into no folder", 2, r"none is no folder; give",
     lambda k: k.command("chat", "-p", "x", "--timeline", str(k.tmp / "none" / "run.json"))),
    ("E_SPLIT", "a model that fits no split", 4, r"fits no split of 2 GPUs \(1:1 needs .* on a GPU, one has 22.* GiB\); use",
     lambda k: k.command("dep", "plan", "mixtral-8x22b", "-m", "B", "--gpus", "2")),
    ("E_SPLIT", "a batch that fits no split", 4, r"fits no split of 8 GPUs \(.* needs .* on a GPU, one has 44.70 GiB\); use",
     lambda k: k.command("dep", "plan", "deepseek-v2", "-m", "A", "--batch", "100000")),
    ("E_SPLIT", "copies that do not fit", 4, r"fits not 1:7 \(1:7 needs .* with 4 copies of its experts, one has .*\); use",
     lambda k: k.command("dep", "plan", "qwen3-235b-a22b", "-m", "A", "--ratio", "1:7", "--replicas", "4")),
    ("E_OPTION", "a link without speed", 2, r"--link 0GB is 0 bytes; give at least 1",
     lambda k: k.command("dep", "plan", "-m", "h200", "--link", "0GB")),
    ("E_OPTION", "zero GPUs", 2, r"--gpus 0 is out of range; give one from 2",
     lambda k: k.command("dep", "plan", "-m", "A", "--gpus", "0")),
    ("E_OPTION", "a ratio that does not add up", 2, r"--ratio 3:4 is 7 GPUs, --gpus says 8; let",
     lambda k: k.command("dep", "plan", "-m", "A", "--ratio", "3:4")),
    ("E_OPTION", "a ratio that is none", 2, r"--ratio '0:8' is no ratio of at least 1:1; write",
     lambda k: k.command("dep", "plan", "-m", "A", "--ratio", "0:8")),
    ("E_OPTION", "a machine with fewer GPUs", 2, r"2 x toy has 2 GPUs, --gpus says 8; ask for no more",
     lambda k: k.command("dep", "plan", "-m", str(calibrated(k)), "--gpus", "8")),
    ("E_OPTION", "more replicas than expert GPUs", 2, r"--replicas 4 on 2 expert GPUs of --ratio 6:2; ask",
     lambda k: k.command("dep", "plan", "-m", "A", "--ratio", "6:2", "--replicas", "4")),
    ("E_OPTION", "spare places without loads", 2, r"--spare 2 without --skew; give 0 to 4096 places and loads",
     lambda k: k.command("dep", "plan", "-m", "A", "--spare", "2")),
    ("E_OPTION", "splits that are none", 2, r"'1:0' is no split; write attention ranks, a colon, expert ranks",
     lambda k: k.command("dep", "calibrate", str(k.tmp / "m.json"), "--splits", "1:1,1:0")),
    ("E_PROFILE", "costs of another machine", 5, r"was measured on '2 x toy', this is '.*'; calibrate here",
     lambda k: k.command("dep", "costs", str(calibrated(k)), "--here")),
    ("E_PROFILE", "costs that are damaged", 5, r"is no machine's costs \(Expecting property name.*\); calibrate again",
     lambda k: k.command("dep", "costs", str(k.folder(m__json=b"{") / "m.json"))),
    ("E_PROFILE", "costs that are not there", 3, r"there is no machine's file none.json; calibrate one",
     lambda k: k.command("dep", "costs", "none.json")),
    ("E_DEVICE", "a device that is not timed", 7, r"device 'tpu' is not one that is timed; cpu or cuda",
     lambda k: k.command("dep", "calibrate", str(k.tmp / "m.json"), "--device", "tpu")),
    ("E_OPTION", "lengths that are none", 2, r"--length '0' is out of range; give numbers from 1",
     lambda k: k.command("dep", "simulate", "-m", "A", "--length", "1024,0")),
    ("E_OPTION", "too large a sweep", 2, r"513 combinations are asked for, at most 512 are solved; give fewer",
     lambda k: k.command("dep", "simulate", "-m", "A", "--gpus", ",".join(map(str, range(2, 515))), "--length", "8")),
    ("E_OPTION", "a picture of nothing that varies", 2, r"0 things vary, 1 or 2 can be drawn; give fewer",
     lambda k: k.command("dep", "simulate", "-m", "A", "--length", "8", "--png", str(k.tmp / "p.png"))),
    ("E_PROFILE", "costs that are not finite", 5, r"machine\.json is not JSON \(NaN .*; calibrate",
     lambda k: k.command("dep", "plan", "-m", str(calibrated(k, "[0.001,", "[NaN,")))),
    ("E_PROFILE", "costs below nothing", 5, r"gemm.a of machine '2 x toy' is -1\.0, a cost is .* at least 0\); cal",
     lambda k: k.command("dep", "plan", "-m", str(calibrated(k, "[0.001,", "[-1.0,")))),
    ("E_PROFILE", "an unknown machine to plan for", 3, r"by the name 'h300'; did you mean 'h200'",
     lambda k: k.command("dep", "plan", "-m", "h300")),
    ("E_PROFILE", "a machine that is a processor", 3, r"has no link between devices; calibrate",
     lambda k: k.command("dep", "plan", "-m", str(processor(k)))),
    ("E_LOADS", "loads of another model", 2, r"loads are of 3 experts, the demo, \d+ layers has \d+; give",
     lambda k: k.command("dep", "plan", "-m", "A", "--skew", str(loads(k, [[1, 2, 3]])))),
    ("E_LOADS", "loads that are not there", 3, r"there are no loads 'none'; give",
     lambda k: k.command("dep", "plan", "-m", "A", "--skew", "none")),
    ("E_LOADS", "a load below nothing", 5, r"has the load -1, not one from 0 to 1e12; give",
     lambda k: k.command("dep", "plan", "-m", "A", "--skew", str(loads(k, [[1, -1]])))),
    ("E_LOADS", "a law without exponent", 2, r"zipf:steep has no exponent from 0 to 4; write",
     lambda k: k.command("dep", "plan", "-m", "A", "--skew", "zipf:steep")),
    ("E_CTX", "a batch beyond the plan", 4, r"1 x 17 tokens do not fit the 16 .*; load with a larger --ctx",
     lambda k: k.load(k.toy("mixtral"), ctx=16).model(toys.ids(1, 17))),
    ("E_SCHEMA", "a schema that cannot be enforced", 2, r"Unimplemented keys: .*not.*; simplify",
     lambda k: mask_for({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, k.load().tokenizer)),
    ("E_SCHEMA", "a schema too deep", 2, r"more than 32 levels deep; make", lambda k: check_schema(nested(40))),
    ("E_TOOLS", "tools for a model without", 2, r"chat template has no place for tools; use another",
     lambda k: prepare([{"role": "user", "content": "x"}], [TOOL], "auto", k.load().tokenizer)),
    ("E_TOOLS", "too many tools", 2, r"129 tools, at most 128 may be; send fewer", lambda k: check_tools([TOOL] * 129)),
    ("E_TEMPLATE", "messages that are none", 2, r"0 messages.*; pass", lambda k: k.load().generate([])),
    ("E_OPTION", "no room to answer", 2, r"max_new_tokens=0 .*; ask for at least 1",
     lambda k: k.load().generate("x", max_new_tokens=0)),
    ("E_OPTION", "an unknown way to sample", 2, r"'top_q'; did you mean 'top_", lambda k: k.load().generate("x", top_q=1)),
    ("E_OPTION", "several answers at once", 2, r"num_return_sequences=2, an Answer holds 1; call",
     lambda k: k.load().generate("x", num_return_sequences=2)),
    ("E_SETTING", "a temperature below nothing", 2, r"temperature -1.0 is out of range; give one from 0",
     lambda k: settings.sampling(8, -1.0, None, None)),
    ("E_SETTING", "a setting in words", 2, r"seed 'x' is no int; give one from", lambda k: repl._set({}, "seed x")),
    ("E_SETTING", "an unknown setting", 2, r"'temprature'; did you mean 'temperature'",
     lambda k: repl._set({}, "temprature 1")),
    ("E_COMMAND", "an unknown chat command", 2, r"/sats; did you mean 'stats'",
     lambda k: repl._command(None, {}, "sats", "")),
    ("E_USAGE", "an unknown command", 2, r"'chart'.*Did you mean.*chat.*--help", lambda k: k.command("chart")),
    ("E_USAGE", "an argument too few", 2, r"Missing .*--help", lambda k: k.command("convert")),
    ("E_INTERNAL", "a fault of ours", 1, r"TypeError: .*; run `duoserve --debug", raises_type_error),
]  # fmt: skip
ELSEWHERE = {"E_FAILED", "E_INPUT"}  # said in a chat that goes on, tested below
ELSEWHERE |= {"E_LOST"}  # said by ranks, tested in test_dep_run.py


@pytest.fixture
def kit(toy: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    with contextlib.ExitStack() as stack:
        yield Kit(toy, load, tmp_path, monkeypatch, stack)
    codec._bitsandbytes.cache_clear()


@pytest.mark.parametrize(("code", "what", "status", "says", "act"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_an_error_says_what_happened_and_what_to_do(
    kit: Kit, code: str, what: str, status: int, says: str, act: Callable[[Kit], Any]
) -> None:
    if code == "E_DEVICE":
        kit.patch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refusal) as raised:
        act(kit)
    line = str(raised.value)
    assert (raised.value.code, raised.value.status) == (code, status), line
    assert re.search(says, line) and line.startswith(f"{code}: ") and len(line.splitlines()) == 1, line


PROCESSES = [
    (("chat", "--budget", "six"), 2, "E_SIZE"),
    (("dep", "plan", "-m", "A", "--gpus", "0"), 2, "E_OPTION"),
    (("verify", "."), 3, "E_STORE"),
    (("verify", "STORE"), 5, "E_STORE"),
]


@pytest.mark.parametrize(("args", "status", "code"), PROCESSES)
def test_a_process_ends_with_its_status_and_one_line(kit: Kit, args: tuple[str, ...], status: int, code: str) -> None:
    if "STORE" in args:
        store = kit.store(lambda folder: cut(folder / "experts-000.safetensors", 1))
        args = tuple(str(store) if a == "STORE" else a for a in args)
    done = subprocess.run(
        [sys.executable, "-m", "duoserve.cli", *args], capture_output=True, text=True, timeout=120, cwd=kit.tmp,
        env=os.environ | {"DUOSERVE_CACHE": str(kit.tmp / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(f"error: {code}: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_chat_goes_on_after_a_failed_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    assert repl._guarded(fail) is None
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: E_FAILED: .*Input/output error; try again, or /quit\n", line)


def test_a_chat_goes_on_after_a_line_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "bad"), "next", EOFError()])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert list(repl._lines(terminal=False)) == ["next"]
    assert capsys.readouterr().err == "error: E_INPUT: the line is not UTF-8 at byte 3; type it again\n"


def codes_in_source() -> set[str]:
    """Of every string in the package that begins with, or is followed as, a code."""
    found: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"(?:^|error: )(E_[A-Z0-9_]+)", node.value))
    return found


def statuses_in_source() -> dict[str, set[int]]:
    """code -> exit statuses of its Refusals."""
    found: dict[str, set[int]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if path.name in ("core.py", "running.py"):  # where one Refusal is made from another
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                code, status = node.args[0], node.args[3] if len(node.args) > 3 else ast.Constant(2)
                assert isinstance(code, ast.Constant) and isinstance(status, ast.Constant), ast.unparse(node)
                found.setdefault(str(code.value), set()).add(int(status.value))
    return found


def documented() -> dict[str, set[int]]:
    rows = re.findall(r"^\| (E_[A-Z0-9_]+) \| ([-\d, ]+) \| (.+) \| (.+) \|$", DOCS.read_text(), re.MULTILINE)
    assert len({code for code, *_ in rows}) == len(rows)
    return {code: {int(n) for n in re.findall(r"\d+", status)} for code, status, _, _ in rows}


def test_the_catalogue_has_every_code_of_the_source() -> None:
    assert {case[0] for case in CASES} | ELSEWHERE == codes_in_source()
    assert len(CASES) >= 40


def test_the_docs_have_every_code_and_status_of_the_source() -> None:
    assert set(documented()) == codes_in_source()
    for code, statuses in statuses_in_source().items():
        assert statuses <= documented()[code], code
    for code in documented():
        triggered = {case[2] for case in CASES if case[0] == code}
        assert triggered <= documented()[code], code
