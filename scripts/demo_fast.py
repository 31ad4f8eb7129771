"""Experts and attention as the demo model trains them on a CPU: the stock mathematics in shapes that a CPU likes.

Registered with transformers under the name "demo"; the model class stays stock and so do its weights. Two reasons:
oneDNN compiles a kernel for every new matrix shape (about 0.5 ms, more than the product takes), so each expert's
rows are padded to a multiple of ROWS and few shapes occur; and torch's flash attention for CPUs is slower than plain
products for short windows, mostly backward.

Shapes: T tokens, K experts per token, P padded rows, D hidden size, E experts.
"""

import torch
from torch.nn.functional import grouped_mm
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROWS = 64  # padding unit, tokens
NAME = "demo"


class Dispatch(torch.autograd.Function):
    """x_TD -> rows_PD, a copy of each token's state for each of its experts. Padding rows repeat token 0."""

    @staticmethod
    def forward(ctx, x_TD, token_of_row_P, row_of_slot_TK):
        ctx.save_for_backward(row_of_slot_TK)
        return x_TD.index_select(0, token_of_row_P)

    @staticmethod
    def backward(ctx, grad_PD):
        (row_of_slot_TK,) = ctx.saved_tensors
        grad = grad_PD.index_select(0, row_of_slot_TK.flatten())
        return grad.view(*row_of_slot_TK.shape, -1).sum(1), None, None


class Combine(torch.autograd.Function):
    """rows_PD, weights_TK -> y_TD, the weighted sum of each token's rows. Padding rows get no gradient."""

    @staticmethod
    def forward(ctx, rows_PD, weights_TK, row_of_slot_TK):
        rows_TKD = rows_PD.index_select(0, row_of_slot_TK.flatten()).view(*row_of_slot_TK.shape, -1)
        ctx.save_for_backward(rows_TKD, weights_TK, row_of_slot_TK)
        ctx.rows = len(rows_PD)
        return torch.bmm(weights_TK.unsqueeze(1), rows_TKD).squeeze(1)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_TKD, weights_TK, row_of_slot_TK = ctx.saved_tensors
        grad_TKD = grad_TD.unsqueeze(1) * weights_TK.unsqueeze(2)
        grad_rows_PD = grad_TD.new_zeros(ctx.rows, grad_TD.shape[1])
        grad_rows_PD.index_copy_(0, row_of_slot_TK.flatten(), grad_TKD.flatten(0, 1))
        return grad_rows_PD, torch.bmm(rows_TKD, grad_TD.unsqueeze(2)).squeeze(2), None


def padded_layout(expert_TK, experts):
    """Where each (token, expert) pair lies when every expert's rows begin at a multiple of ROWS.

    Returns token_of_row_P, row_of_slot_TK and the padded ends (E, int32) that grouped_mm takes.
    """
    flat = expert_TK.flatten()
    order = torch.argsort(flat, stable=True)
    counts_E = torch.bincount(flat, minlength=experts)
    padded_E = (counts_E + ROWS - 1) // ROWS * ROWS
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_of_slot = torch.empty_like(flat)
    row_of_slot[order] = torch.arange(len(flat)) + shift_E[flat[order]]
    token_of_row = torch.zeros(int(ends_E[-1]), dtype=torch.long)
    token_of_row[row_of_slot] = torch.arange(len(flat)) // expert_TK.shape[1]
    return token_of_row, row_of_slot.view_as(expert_TK), ends_E.to(torch.int32)


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The routed experts of one layer; `self` is the stock experts module (signature given by transformers)."""
    token_of_row, row_of_slot, ends = padded_layout(top_k_index, self.num_experts)
    rows = Dispatch.apply(hidden_states, token_of_row, row_of_slot)
    inner = self._apply_gate(grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends))
    rows = grouped_mm(inner, self.down_proj.transpose(1, 2), offs=ends)
    return Combine.apply(rows, top_k_weights.to(rows.dtype), row_of_slot)


def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention over full windows, no cache and no padding: query (B, H, T, C), key and value (B, G, T, C).

    The queries that share a key head are rows of one product.
    """
    B, H, T, C = query.shape
    G = key.shape[1]
    shared = query.reshape(B * G, H // G * T, C)
    scores = torch.bmm(shared, key.reshape(B * G, T, C).transpose(1, 2)) * scaling
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.view(B, H, T, T).masked_fill_(future, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(B * G, H // G * T, T), value.reshape(B * G, T, C))
    return out.view(B, H, T, C).transpose(1, 2), None


def install(model):
    """Makes a stock model train with the functions above."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    AttentionInterface.register(NAME, attention_forward)
    model.set_experts_implementation(NAME)
    model.set_attn_implementation(NAME)
