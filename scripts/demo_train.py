"""Trains the demo model: data order, losses, schedule, checkpoints.

Stock Qwen3MoeForCausalLM with bf16 weights and fp32 masters (demo_optim), in shapes that a CPU likes (demo_fast).
Knows token files, not text. Every step is a function of (seed, step): the order of the data needs no state, and a
killed run goes on from its last checkpoint as if it had not been killed.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import demo_fast
import numpy as np
import torch
from demo_optim import Optimizer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

MICRO = 4096  # tokens per forward pass
MICRO_STEPS = 2  # forward passes per update
SEED = 1
WARMUP = 50  # steps
LR_MATRICES, LR_OTHERS = 0.02, 4e-3  # Muon, AdamW
WEIGHT_DECAY = 0.1
BALANCE = 0.01
CHAT_STABLE, CHAT_DECAY = 0.08, 0.35  # share of micro-batches that are conversations
EVERY_LOG, EVERY_CHECK, EVERY_SAVE = 20, 250, 100  # steps
EVERY_KEEP = 1000  # steps
CHECK_TOKENS = 102_400
HEAD_ROWS = 512


def config():
    """6 layers of 32 experts, top 4; 12.0 M parameters, 2.7 M of them used for a token.

    No pad_token_id: nn.Embedding would give that token, here the end token, no gradient.
    """
    return Qwen3MoeConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, intermediate_size=384, moe_intermediate_size=96, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE, bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip


def new_model():
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(config()).bfloat16()
    demo_fast.install(model)
    return model


def keep_freed_memory():
    """glibc gives large blocks back to the kernel on every free, and a step then spends half its time in page faults.

    M_MMAP_MAX 0, M_TRIM_THRESHOLD and M_TOP_PAD large, M_ARENA_MAX 1. No effect on other C libraries.
    """
    if hasattr(ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


class Data:
    """Windows of tokens by step. Documents: aligned blocks of the stream in a seeded order, each once per epoch.
    Conversations: windows that begin where a conversation begins."""

    def __init__(self, work):
        self.documents = np.fromfile(work / "train.bin", dtype=np.uint16)
        self.chat = np.fromfile(work / "chat.bin", dtype=np.uint16)
        self.chat_starts = np.load(work / "chat-starts.npy")

    def batch(self, micro, length, chat_share):
        """The micro-batch number `micro` as (rows, length + 1) token ids; a row's last token is only predicted."""
        rng = np.random.default_rng((SEED, micro))
        rows = MICRO // length
        if rng.random() < chat_share:
            usable = self.chat_starts[self.chat_starts < len(self.chat) - length - 1]
            stream, starts = self.chat, rng.choice(usable, rows)
        else:
            stream, starts = self.documents, self._starts(micro * rows, rows, length)
        return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))

    def _starts(self, row, rows, length):
        """Row numbers count on for ever; every epoch has its own order and its own offset of the blocks."""
        blocks = len(self.documents) // length - 2
        epochs = {n // blocks for n in (row, row + rows - 1)}
        rngs = {e: np.random.default_rng((SEED, length, e)) for e in epochs}
        order = {e: (int(rng.integers(length)), rng.permutation(blocks)) for e, rng in rngs.items()}
        return [order[n // blocks][0] + order[n // blocks][1][n % blocks] * length for n in range(row, row + rows)]


def schedule(step, steps, decay_steps):
    """(learning rate factor, window length, chat share): warm-up, stable, then linear decay to 2 % of the rate.

    Longer windows and more conversations come with the decay; 1 in 4 of its steps has windows of 1024.
    """
    into = step - (steps - decay_steps)
    if into <= 0:
        return min(1.0, step / WARMUP), 256, CHAT_STABLE
    length = (512, 256, 1024, 512)[step % 4]
    return 0.02 + 0.98 * (1 - into / decay_steps), length, CHAT_DECAY


def balance_loss(router_logits, top_k=4):
    """Switch Transformers' load balance (arXiv 2101.03961, eq. 4) per layer, summed; 1.0 per layer when uniform.

    transformers' own load_balancing_loss_func joins all layers' tokens first: it lets a layer starve an expert that
    another layer overuses. Returns the loss and each layer's share of slots (L, E).
    """
    loss, shares = 0.0, []
    for logits_TE in router_logits:
        experts = logits_TE.shape[1]
        probabilities = logits_TE.float().softmax(-1)
        chosen = torch.bincount(logits_TE.topk(top_k).indices.flatten(), minlength=experts)
        share_E = chosen / chosen.sum()
        loss = loss + experts * (share_E * probabilities.mean(0)).sum()
        shares.append(share_E)
    return loss, torch.stack(shares)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy (nats) of hidden_TD under the tied head weight_VD, in chunks of rows.

    Computes its gradients on the way: all logits at once would be 64 MB of fp32, twice this machine's cache.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T):
        grad_hidden, grad_weight = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=torch.float32)
        total, count = 0.0, len(targets_T)
        for part in torch.arange(count).split(HEAD_ROWS):
            rows, targets = slice(int(part[0]), int(part[-1]) + 1), targets_T[part].unsqueeze(1)
            logits = (hidden_TD[rows] @ weight_VD.T).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, targets)).sum()
            slopes = logits.sub_(normaliser).exp_()
            slopes.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
            slopes = slopes.div_(count).to(hidden_TD.dtype)
            grad_hidden[rows] = slopes @ weight_VD
            grad_weight += slopes.T @ hidden_TD[rows]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def losses(model, tokens):
    """Cross-entropy in nats per token of (B, T + 1) ids, the balance loss, and the experts' shares (L, E)."""
    output = model.model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    loss = HeadLoss.apply(output.last_hidden_state.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten())
    return loss, *balance_loss(output.router_logits)


def token_bytes(tokenizer_file):
    """Bytes of each token id; special tokens have none. In byte-level BPE a character of a token is one byte."""
    tokenizer = json.loads(Path(tokenizer_file).read_text())
    lengths = np.zeros(len(tokenizer["model"]["vocab"]), dtype=np.int64)
    for token, index in tokenizer["model"]["vocab"].items():
        lengths[index] = len(token)
    lengths[[special["id"] for special in tokenizer["added_tokens"]]] = 0
    return lengths


@torch.no_grad()
def check(model, work, name="heldout", length=512):
    """Held-out bits per byte of evenly spaced windows (CHECK_TOKENS in all), and the experts' shares (L, E)."""
    stream, lengths = np.fromfile(work / f"{name}.bin", dtype=np.uint16), token_bytes(work / "tokenizer.json")
    windows = CHECK_TOKENS // length
    starts = np.linspace(0, len(stream) - length - 1, windows).astype(int)
    rows = np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)
    results = [losses(model, torch.from_numpy(rows[at : at + 8])) for at in range(0, windows, 8)]
    nats = torch.stack([loss for loss, _, _ in results]).mean()
    shares = torch.stack([shares for _, _, shares in results]).mean(0)
    return float(nats) * windows * length / np.log(2) / lengths[rows[:, 1:]].sum(), shares


def describe(shares_LE):
    """Smallest and largest share in percent and entropy over uniform, by layer."""
    entropy = -(shares_LE * shares_LE.clamp_min(1e-9).log()).sum(1) / np.log(shares_LE.shape[1])
    rows = zip(shares_LE.min(1).values, shares_LE.max(1).values, entropy, strict=True)
    return " ".join(f"{100 * low:.2f}-{100 * high:.1f}%/{e:.3f}" for low, high, e in rows)


def held_out_line(model, work):
    bits, shares = check(model, work)
    chat_bits, _ = check(model, work, "heldout-chat")
    return f"heldout {bits:.4f} chat {chat_bits:.4f} bits/byte; experts {describe(shares)}"


def save(work, optimizer, progress):
    """latest.safetensors and .json; stable-<step> every EVERY_KEEP steps. Written aside, then renamed."""
    names = ["latest"] + ([f"step-{progress['step']}"] if progress["step"] % EVERY_KEEP == 0 else [])
    for name in names:
        partial = work / "partial.safetensors"
        save_file(optimizer.state, partial, metadata={"progress": json.dumps(progress)})
        os.replace(partial, work / f"{name}.safetensors")


def load(path, model, optimizer):
    """The state of a checkpoint into the optimizer and the model; returns its progress."""
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        for name, tensor in optimizer.state.items():
            tensor.copy_(file.get_tensor(name))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(optimizer.state[f"master.{name}"])
    return progress


def update(model, optimizer, data, step, steps, decay_steps):
    """One optimizer step. Returns mean cross-entropy (nats), mean balance loss per layer, and the gradient's norm."""
    factor, length, chat_share = schedule(step, steps, decay_steps)
    totals = np.zeros(2)
    for part in range(MICRO_STEPS):
        tokens = data.batch((step - 1) * MICRO_STEPS + part, length, chat_share)
        loss, balance, shares = losses(model, tokens)
        ((loss + BALANCE * balance) / MICRO_STEPS).backward()
        totals += [float(loss.detach()), float(balance.detach()) / len(shares)]
    norm = optimizer.step(step, LR_MATRICES * factor, LR_OTHERS * factor)
    return *(totals / MICRO_STEPS), norm


def train(work, steps, decay_steps, resume=None):
    """Trains to step `steps`, the last `decay_steps` with falling rate, from `resume` or the latest checkpoint.

    SIGTERM saves and stops after the current step.
    """
    keep_freed_memory()
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked_to_stop.append(number))
    (work / "train.pid").write_text(str(os.getpid()))
    data, model = Data(work), new_model()
    optimizer, progress = Optimizer(model, WEIGHT_DECAY), {"step": 0, "tokens": 0, "cpu_seconds": 0.0}
    checkpoint = resume or work / "latest.safetensors"
    if checkpoint.exists():
        progress = load(checkpoint, model, optimizer)
    print(f"from step {progress['step']} to {steps}, decay over the last {decay_steps}", flush=True)
    wall, cpu, mean = time.perf_counter(), time.process_time(), float("nan")
    while progress["step"] < steps and not asked_to_stop:
        step = progress["step"] + 1
        loss, balance, norm = update(model, optimizer, data, step, steps, decay_steps)
        mean = loss if np.isnan(mean) else 0.95 * mean + 0.05 * loss
        progress["step"], progress["tokens"] = step, progress["tokens"] + MICRO * MICRO_STEPS
        progress["cpu_seconds"] += time.process_time() - cpu
        cpu = time.process_time()
        if step % EVERY_LOG == 0:
            speed = EVERY_LOG * MICRO * MICRO_STEPS / (time.perf_counter() - wall)
            wall = time.perf_counter()
            print(f"{step} loss {mean:.3f} balance {balance:.3f} norm {norm:.2f} {speed:.0f} tok/s", flush=True)
        if step % EVERY_CHECK == 0 or step == steps:
            print(f"{step} {held_out_line(model, work)}", flush=True)
        if step % EVERY_SAVE == 0 or step == steps or asked_to_stop:
            save(work, optimizer, progress)
