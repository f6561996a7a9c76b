"""Small H-Nets, and their equations as loops over documents and tokens. Not a test by itself."""

from typing import Any

import torch
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.hnet.config import HNetConfig
from titanarch.models.hnet.model import HNet
from titanarch.models.hnet.stage import Stack

V, T = 41, 32
LENGTHS = (9, 1, 22)
BASE: dict[str, Any] = {"d_model": 16, "n_heads": 2, "channel": {"kind": "mlp", "d_ff": 24}, "init": {"std": 0.3}}
ATTENTION: dict[str, Any] = {"layers": ["attention"]}
ONE_STAGE: dict[str, Any] = {
    "stages": [{"encoder": ATTENTION, "decoder": ATTENTION, "ratio": 3.0}],
    "main": ATTENTION,
    "position": {"relative": "rotary"},
}
TWO_STAGES: dict[str, Any] = {
    "stages": [
        {"encoder": {"layers": ["mamba2"]}, "decoder": {"layers": ["mamba2", "attention"]}, "channel": "none", "ratio": 2.0},
        {"encoder": ATTENTION, "decoder": ATTENTION, "d_model": 24, "ratio": 1.5},
    ],
    "main": {"layers": ["attention"], "n_layers": 2, "d_model": 32, "channel": {"kind": "swiglu", "d_ff": 20}},
    "position": {"relative": ["rotary", "alibi"]},
    "mixers": {"mamba2": {"head_dim": 8, "state_dim": 4}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one_stage": ONE_STAGE,
    "two_stages": TWO_STAGES,
    "post_norm": {**ONE_STAGE, "residual": "post_norm"},
}


def hnet(table: dict[str, Any], *, seed: int = 0) -> HNet:
    """In float64; what starts at zero or at the identity is moved, so that every part and every gradient counts."""
    config = HNetConfig.model_validate({**BASE, **table})
    model = HNet(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=seed, n_layers=9))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stage in model.bare_stages():
            moved = [stage.router.wq.weight, stage.router.wk.weight, *stage.residual.parameters(), *stage.parameters(recurse=False)]
            for parameter in moved:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def tokens(n_rows: int = 1) -> Tensor:
    return torch.randint(V, (n_rows, T), generator=torch.Generator().manual_seed(1))


def packed() -> SequenceInfo:
    """A row of three documents."""
    return SequenceInfo.of_lengths([LENGTHS])


class Oracle:
    """The equations a document and a token at a time; only the blocks are the model's. ``p``: each stage's probabilities."""

    def __init__(self, model: HNet) -> None:
        self.model = model
        self.p: list[list[Tensor]] = [[] for _ in model.stages]

    def hidden(self, tokens_T: Tensor) -> Tensor:
        x = self.level(0, self.model.embedding.weight[tokens_T])
        return x if self.model.final_norm is None else self.model.final_norm(x)

    def level(self, number: int, x_TD: Tensor) -> Tensor:
        if number == len(self.model.stages):
            return self.blocks(self.model.main, x_TD)
        stage = self.model.bare_stages()[number]
        x_TD = self.blocks(stage.encoder, x_TD)
        p = [x_TD.new_ones(())]
        for t in range(1, len(x_TD)):
            q, k = stage.router.wq.weight @ x_TD[t - 1], stage.router.wk.weight @ x_TD[t]
            p.append((1 - (q @ k) / (q @ q).sqrt() / (k @ k).sqrt()) / 2)
        self.p[number] += p
        begins = [t for t in range(len(p)) if p[t] > 0.5]
        wider = [torch.cat([x_TD[t], stage.pad_P]) if "pad_P" in stage._parameters else x_TD[t] for t in begins]
        z = iter(self.level(number + 1, torch.stack(wider)))
        out, average = [], torch.zeros_like(x_TD[0])
        for t in range(len(x_TD)):
            if t in begins:
                weight = p[t] if t == 0 else p[t].clamp(1e-4, 1 - 1e-4)
                average = weight * next(z)[: len(x_TD[t])] + (1 - weight) * average
            decided = p[t] if t in begins else 1 - p[t]
            residual = stage.residual.linear.weight @ x_TD[t] + stage.residual.linear.bias
            out.append(average * (decided + (1 - decided).detach()) + residual)
        return self.blocks(stage.decoder, torch.stack(out))

    def blocks(self, stack: Stack, x_TD: Tensor) -> Tensor:
        x = x_TD[None]
        for block in stack.bare_blocks:
            x, _ = block(x, SequenceInfo.whole(1, len(x_TD)), Carry.empty())
        return (x if stack.norm is None else stack.norm(x))[0]

    def ratio_loss(self, number: int) -> Tensor:
        N, p = self.model.config.stages[number].ratio, torch.stack(self.p[number])
        share = (p > 0.5).double().mean()
        return N / (N - 1) * ((N - 1) * share * p.mean() + (1 - share) * (1 - p.mean()))
