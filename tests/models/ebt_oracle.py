"""The energy-based transformer written out: one mask over 2T + 1 tokens, rotation by complex numbers, autograd.grad. Not a test.

Tokens are the step embedding (where there is one), T contexts, T predictions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.contract.sequence import SequenceInfo
from titanarch.models.ebt.model import EBT
from titanarch.ops.counter_random import column_words, normal, random_bits, token_keys, uniform_integers

SITE = 1 << 20


def _norm(kind: str, module: Any, x: Tensor) -> Tensor:
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
        return x if module.bias is None else x + module.bias
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight


def _turned(x: Tensor, position: Tensor) -> Tensor:
    """[B, S, H, K] as complex numbers (channel i with i + K/2) times exp(i position frequency)."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = position[..., None, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def _visible(seq: SequenceInfo, has_step: bool) -> Tensor:
    """[B, S, S] by a loop over what each token may read."""
    n_rows, length = seq.position_BT.shape
    first = int(has_step)
    visible = torch.zeros(n_rows, first + 2 * length, first + 2 * length, dtype=torch.bool)
    visible[:, :, :first] = True
    for t in range(length):
        for s in range(t + 1):
            same = seq.document_BT[:, s] == seq.document_BT[:, t]
            visible[:, first + t, first + s] = same
            visible[:, first + length + t, first + s] = same
        visible[:, first + length + t, first + length + t] = True
    return visible


def _attention(block: Any, x: Tensor, position: Tensor, visible: Tensor) -> Tensor:
    mixer = block.mixer
    K, H = mixer.head_dim, mixer.config.n_heads
    q, k, v = (linear(x).unflatten(-1, (-1, K)) for linear in (mixer.wq, mixer.wk, mixer.wv))
    if mixer.config.qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * g for z, g in ((q, mixer.q_gain_K), (k, mixer.k_gain_K)))
    q, k = _turned(q, position), _turned(k, position)
    heads = []
    for h in range(H):
        g = h * k.shape[2] // H
        score = (q[:, :, h] @ k[:, :, g].transpose(1, 2) / K**0.5).masked_fill(~visible, -torch.inf)
        heads.append(score.softmax(-1) @ v[:, :, g])
    y = torch.cat(heads, -1)
    if mixer.config.output_gate:
        y = y * torch.sigmoid(mixer.wg(x))
    out: Tensor = mixer.wo(y)
    return out


def _channel(channel: Any, x: Tensor) -> Tensor:
    out: Tensor = channel.down(F.gelu(channel.up(x)) if hasattr(channel, "activation") else F.silu(channel.gate(x)) * channel.up(x))
    return out


def dense_energies(model: EBT, tokens_BT: Tensor, e_BTD: Tensor, seq: SequenceInfo, number: int) -> Tensor:
    """Energies [B, T] of embedded predictions in landscape ``number``."""
    landscape, kind = model.landscape, model.config.norm.kind
    parts, positions = [model.embedding(tokens_BT), e_BTD], [seq.position_BT, seq.position_BT + 1]
    if landscape.step_MD is not None:
        parts.insert(0, landscape.step_MD[number].expand(len(tokens_BT), 1, -1))
        positions.insert(0, torch.full((len(tokens_BT), 1), -1))
    x, position = torch.cat(parts, 1), torch.cat(positions, 1)
    visible = _visible(seq, landscape.step_MD is not None)
    for block in landscape.blocks():
        x = x + _attention(block, _norm(kind, block.mixer_norm, x), position, visible)
        if block.channel is not None:
            x = x + _channel(block.channel, _norm(kind, block.channel_norm, x))
    x = _norm(kind, landscape.final_norm, x)[:, -e_BTD.shape[1] :]
    return (x @ landscape.head.weight.t()).squeeze(-1)


def _uniform(seq: SequenceInfo, site: int) -> Tensor:
    assert seq.seed is not None, "draws are of training"
    bits = random_bits(token_keys(seq.seed, seq.row_B, seq.index_T, site), column_words(torch.arange(1)))
    return (((bits >> 8).float() + 2.0**23 + 0.5) / 2**24).double()


def dense_objective(model: EBT, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """The objective and the loss of each row's last step, all logits in memory, every row alone."""
    config, V = model.config, model.shape.vocab_size
    assert seq.seed is not None, "the objective is of training"
    draws: dict[str, Any] = {"seed": seq.seed, "row_B": seq.row_B, "index_T": seq.index_T, "n_channels": V}
    p = normal(**draws, site=SITE).double() if config.start == "noise" else torch.zeros(*tokens_BT.shape, V, dtype=torch.float64)
    extra = uniform_integers(seq.seed, seq.row_B, SITE + 1, config.random_steps + 1)
    table = (model.embedding if model.prediction is None else model.prediction).weight
    size = config.step_size if model.step_size is None else model.step_size
    p.requires_grad_()
    after = []
    for i in range(config.n_steps + config.random_steps):
        if config.detach:
            p = p.detach().requires_grad_()
        if config.langevin_noise:
            p = p + config.langevin_noise * normal(**draws, site=SITE + 2 + 2 * i).double()
        s = p.softmax(-1)
        energy = dense_energies(model, tokens_BT, s @ table, seq, min(i, config.n_steps - 1)).sum()
        p = s if config.gradient_by == "distribution" else p
        (gradient,) = torch.autograd.grad(energy, p, create_graph=True)
        scale = config.random_step_scale
        factor = 1 / scale + _uniform(seq, SITE + 3 + 2 * i) * (scale - 1 / scale)
        p = p - size * factor * gradient
        after.append(p)
    total = loss_sum = torch.zeros((), dtype=torch.float64)
    for row, n in enumerate((config.n_steps + extra).tolist()):
        costs, losses = [], []
        for logits in after[:n]:
            loss = F.cross_entropy(logits[row], labels_BT[row], ignore_index=-100, reduction="sum")
            z = (logits[row].logsumexp(-1) ** 2)[labels_BT[row] != -100].sum()
            losses.append(loss.detach())
            costs.append(loss + z_weight * z)
        total = total + (costs[-1] if config.loss == "last" else torch.stack(costs).mean())
        loss_sum = loss_sum + losses[-1]
    return total, loss_sum
