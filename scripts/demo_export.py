"""Checkpoint to hub layout, and what the exported model is worth: bits per byte, xz, load of the experts.

Knows checkpoints (demo_train) and text files; what it evaluates is loaded as a user would load it.
"""

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import demo_fast
import demo_train
import torch
import torch.nn.functional as F
from demo_optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

WINDOW = 512  # tokens predicted per window; each but the first window is given the token before it
BATCH = 8
TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("roles are system, user and assistant, not " + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] }}
    {{- '<|endoftext|>' if message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
GENERATION = GenerationConfig(
    bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2
)


def export(work, checkpoint, out):
    """Writes model, tokenizer and settings aside and renames them into `out`, file by file."""
    model = demo_train.new_model()
    progress = demo_train.load(checkpoint, model, Optimizer(model, 0))
    model.generation_config = GENERATION
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        model.save_pretrained(aside)
        tokenizer(work).save_pretrained(aside)
        for path in Path(aside).iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)
    print(f"{out}: {progress}")


def tokenizer(work):
    special = ["<|system|>", "<|user|>", "<|assistant|>"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", additional_special_tokens=special, model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = TEMPLATE
    return wrapped


def windows(ids):
    """(context, targets) pairs that predict every token once; the first window's context is the end token.

    All but the last are WINDOW long.
    """
    stream = [0, *ids]
    return [(stream[at : at + WINDOW][: len(ids) - at], ids[at : at + WINDOW]) for at in range(0, len(ids), WINDOW)]


@torch.no_grad()
def score(model, ids):
    """Total bits of all ids under the model, and how many slots each expert of each layer got (L, E)."""
    pairs = windows(ids)
    whole, last = pairs[:-1], pairs[-1:]
    bits, counts = 0.0, 0
    for batch in [*(whole[at : at + BATCH] for at in range(0, len(whole), BATCH)), last]:
        contexts, targets = (torch.tensor(part) for part in zip(*batch, strict=True))
        output = model(input_ids=contexts, use_cache=False, output_router_logits=True)
        nats = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        bits += float(nats) / math.log(2)
        counts = counts + torch.stack([slots(logits) for logits in output.router_logits])
    return bits, counts


def slots(router_logits_TE, top_k=4):
    return torch.bincount(router_logits_TE.topk(top_k).indices.flatten(), minlength=router_logits_TE.shape[1])


def xz_bytes(path):
    return len(subprocess.run(["xz", "-9e", "-c", str(path)], check=True, capture_output=True).stdout)


def evaluate(work, folder):
    """Prints one JSON object: held-out bits per byte of model and xz over the same whole file, and expert shares."""
    demo_train.keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    demo_fast.install(model)  # the stock mathematics, several times faster on a CPU
    path = work / "heldout.txt"
    text = path.read_bytes().decode()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    bits, counts = score(model, ids)
    size, shares = path.stat().st_size, counts / counts.sum(1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(1) / math.log(shares.shape[1])
    result = {
        "heldout_bytes": size,
        "heldout_tokens": len(ids),
        "bits_per_byte": round(bits / size, 4),
        "nats_per_token": round(bits * math.log(2) / len(ids), 4),
        "xz_bits_per_byte": round(8 * xz_bytes(path) / size, 4),
        "expert_share_min": [round(float(s), 4) for s in shares.min(1).values],
        "expert_share_max": [round(float(s), 4) for s in shares.max(1).values],
        "expert_entropy_over_uniform": [round(float(e), 4) for e in entropy],
    }
    print(json.dumps(result, indent=1))
    return result
