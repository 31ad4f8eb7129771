"""The demo model's optimiser: Muon for matrices, AdamW for embeddings, routers and norms; fp32 masters of bf16 weights.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by its nearest
orthogonal matrix, found by five Newton-Schulz steps. Here the matrices of all experts and layers of one shape go
through them as one batch. Knows parameters by name and shape; knows nothing of losses or schedules.
"""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that sends singular values near 1 in few steps
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.95), 1e-10
ADAMW = ("embed_tokens.weight", "gate.weight")


def orthogonal(x_NRC):
    """The nearest orthogonal matrices, roughly: singular values end in about 0.7..1.2. bf16 inside."""
    a, b, c = NEWTON_SCHULZ
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = (x_NRC.transpose(1, 2) if tall else x_NRC).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


def split(name, tensor):
    """A parameter as a batch of matrices (N, R, C): gate and up halves and every expert on their own."""
    if name.endswith("gate_up_proj"):
        return tensor.view(-1, tensor.shape[1] // 2, tensor.shape[2])
    return tensor.view(-1, *tensor.shape[-2:])


class Optimizer:
    """Owns the fp32 masters and moments; `step` reads the model's gradients and writes its weights.

    The state is a flat dict of tensors, so that a checkpoint is one safetensors file.
    """

    def __init__(self, model, weight_decay):
        self.weights = dict(model.named_parameters())
        self.others = [n for n, p in self.weights.items() if p.ndim == 1 or n.endswith(ADAMW)]
        self.matrices = [n for n in self.weights if n not in set(self.others)]
        self.weight_decay = weight_decay
        self.state = {f"master.{n}": p.detach().float().clone() for n, p in self.weights.items()}
        self.state |= {f"first.{n}": torch.zeros_like(self.state[f"master.{n}"]) for n in self.weights}
        self.state |= {f"second.{n}": torch.zeros_like(self.state[f"master.{n}"]) for n in self.others}

    @torch.no_grad()
    def step(self, number, lr_matrices, lr_others, clip=1.0):
        """One update from the gradients in the model, clipped to a global norm, which is returned. `number` from 1."""
        grads = {n: p.grad.float() for n, p in self.weights.items()}
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
        scale = min(1.0, clip / (float(norm) + 1e-6))
        for grad in grads.values():
            grad.mul_(scale)
        self._adamw(grads, number, lr_others)
        self._muon(grads, lr_matrices)
        for name, weight in self.weights.items():
            weight.copy_(self.state[f"master.{name}"])
            weight.grad = None
        return float(norm)

    def _adamw(self, grads, number, lr):
        beta1, beta2 = BETAS
        for name in self.others:
            master, first, second = (self.state[f"{part}.{name}"] for part in ("master", "first", "second"))
            first.lerp_(grads[name], 1 - beta1)
            second.lerp_(grads[name].square(), 1 - beta2)
            denominator = (second / (1 - beta2**number)).sqrt_().add_(EPS)
            master.addcdiv_(first, denominator, value=-lr / (1 - beta1**number))

    def _muon(self, grads, lr):
        groups = {}
        for name in self.matrices:
            first = self.state[f"first.{name}"]
            first.lerp_(grads[name], 1 - MOMENTUM)
            nesterov = grads[name].lerp_(first, MOMENTUM)
            pieces = split(name, nesterov)
            groups.setdefault(pieces.shape[1:], []).append((name, pieces))
        for (rows, columns), members in groups.items():
            names, pieces = zip(*members, strict=True)
            updates = orthogonal(torch.cat(pieces)) * max(1.0, rows / columns) ** 0.5
            for name, update in zip(names, updates.split([len(p) for p in pieces]), strict=True):
                master = self.state[f"master.{name}"]
                master.mul_(1 - lr * self.weight_decay)
                master.sub_(update.reshape(master.shape), alpha=lr)
