"""Mixture of experts: every token goes through the few gated units that a router chooses for it, and through shared ones.

The Mixtral form (arXiv:2401.04088): softmax scores, the chosen weights normalized, a balance loss (Switch Transformers,
arXiv:2101.03961). The DeepSeek-V3 form (arXiv:2412.19437): sigmoid scores, shared experts, a scaling factor, and in place of the loss a
bias that only the choice sees, moved after every update towards experts that got too few tokens. No token is dropped.

What runs where: products are grouped by expert (``titanarch/ops/grouped_mm.py``): one kernel in bfloat16 on CUDA, else a product an
expert, in any dtype and on any device. Both have static shapes, so blocks compile whole; on CUDA the latter waits for the counts in every
call. torch's own grouped product would be eager only in float32, which is why it is not used there. The router computes in fp32 at
least and never in float8; neither do the experts, whose products are no Linears. Every process holds its share of all experts: there is
no expert parallelism, FSDP divides their weights and tensor parallelism the hidden units of each.

Auxiliary terms, for the mean over processes and micro-batches, the losses summed over blocks and the metrics averaged: ``moe_balance``
(1 a block where all is even), ``moe_z``, ``moe_imbalance`` (tokens of the busiest expert over the mean), ``moe_dropped`` (0).

Shapes: B rows, T tokens, D model dim, E experts, K experts a token, F hidden units an expert.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from titanarch.contract.card import Card
from titanarch.contract.channel import ChannelConfig, ChannelMixer, channel_mixer
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.experts import MATRICES, Experts, TokenCounts, count_of
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.roles import Role
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import Split

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MoEConfig(ChannelConfig):
    """[model.channel] of kind moe."""

    n_experts: Positive = Field(8, description="experts to choose from")
    top_k: Positive = Field(2, description="experts that a token goes through, beside the shared ones")
    d_ff: Positive | None = Field(
        None, description="hidden units of an expert; unset: those of a swiglu over the experts of a token, rounded up to a multiple of 64"
    )
    n_shared: Annotated[int, Field(ge=0)] = Field(0, description="experts that every token goes through, as one of n_shared * d_ff units")
    scores: Literal["softmax", "sigmoid"] = Field("softmax", description="of the router: over all experts, or of each by itself")
    normalize: bool = Field(True, description="divide the weights of the chosen experts by their sum")
    scaling_factor: Annotated[float, Field(gt=0)] = Field(1.0, description="factor of the weights of the chosen experts")
    balance_weight: NonNegative = Field(0.01, description="weight of the balance loss; 0: there is none")
    balance_over: Literal["row", "batch"] = Field(
        "row",
        description="tokens that the balance loss wants even: of each row, so that no layout changes the loss; or of a micro-batch on all "
        "processes, so that training.local_batch_size does",
    )
    bias_rate: NonNegative = Field(0.0, description="how far an update moves the bias of an expert in the choice; 0: there is no bias")
    z_weight: NonNegative = Field(1e-3, description="weight of the mean squared log-partition of the router; 0: there is none")

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k ({self.top_k}) is above n_experts ({self.n_experts}); a token cannot choose an expert twice")
        return self

    @property
    def shared_units(self) -> int:
        """Hidden units of the shared experts."""
        assert self.d_ff is not None, "a channel mixer fills it in"
        return self.n_shared * self.d_ff

    def sized(self, d_model: int) -> "MoEConfig":
        """The same table with ``d_ff`` filled in."""
        if self.d_ff is not None:
            return self
        units = 64 * math.ceil(round(8 / 3 * d_model / (self.top_k + self.n_shared) / 64, 6))
        return self.model_copy(update={"d_ff": units})


class Router(Linear):
    """Scores of experts; its matrix is too narrow for Muon."""

    roles: ClassVar[dict[str, Role]] = {"weight": MATRICES}


@channel_mixer("moe")
class MoE(ChannelMixer):
    """sum over the chosen experts e of w_e E_e(x), and the shared experts of x."""

    Config = MoEConfig
    card = Card(
        "mixture of experts",
        "arXiv:2401.04088, arXiv:2412.19437",
        "transformers MixtralSparseMoeBlock, DeepseekV3MoE",
        ("torch",),
        differs={"flops": "torch's counter does not see inside the grouped product of the experts"},
    )
    tensor_parallel: ClassVar[Mapping[str, Split]] = {
        "router": Split.SHARED,
        "experts": Split.COLUMN("d_ff"),
        "shared_gate": Split.COLUMN("shared_units"),
        "shared_up": Split.COLUMN("shared_units"),
        "shared_down": Split.ROW,
        "counts": Split.REPLICATED,
    }
    float8 = frozenset({"shared_gate", "shared_up", "shared_down"})
    fp32 = frozenset({"router"})
    config: MoEConfig
    bias_E: Tensor
    tokens_E: Tensor

    def __init__(self, config: MoEConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.config = config = config.sized(shape.d_model)
        self.layer = layer
        D, E = shape.d_model, config.n_experts
        assert config.d_ff is not None
        self.router = Router(D, E, bias=False)
        self.experts = Experts(E, D, config.d_ff)
        self.counts = TokenCounts()
        if config.n_shared:
            self.shared_gate = Linear(D, config.shared_units, bias=False)
            self.shared_up = Linear(D, config.shared_units, bias=False)
            self.shared_down = Linear(config.shared_units, D, bias=False)
        if config.bias_rate:
            self.register_buffer("bias_E", torch.empty(E, dtype=torch.float32))
            # Recomputation in the backward counts tokens again, all of a block's alike, and only the sign of a difference is used.
            self.register_buffer("tokens_E", torch.empty(E, dtype=torch.float32), persistent=False)

    @staticmethod
    def cost(config: MoEConfig, shape: ModelShape) -> Cost:
        config, D, E = config.sized(shape.d_model), shape.d_model, config.n_experts
        assert config.d_ff is not None
        expert = 3 * D * config.d_ff
        n_used = config.top_k + config.n_shared
        return linear_cost(D, E) + Cost(
            parameters=(E + config.n_shared) * expert,
            forward_flops_per_token=2.0 * n_used * expert,
            idle_parameters=(E - config.top_k) * expert,
        )

    def reset_parameters(self, init: Init) -> None:
        """Router, gates and ups as linears of the scheme, downs as residual outputs; the bias 0."""
        init.linear(self.router)
        self.experts.reset_parameters(init, self.layer)
        if self.config.n_shared:
            init.linear(self.shared_gate)
            init.linear(self.shared_up)
            init.residual_output(self.shared_down, self.layer)
        if self.config.bias_rate:
            self.bias_E.zero_()
            self.tokens_E.zero_()

    def run(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Tensor, Carry]:
        out: tuple[Tensor, Carry] = self(x_BTD, seq, carry)
        return out

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, carry: Carry | None = None) -> Any:
        """[B, T, D]; with a carry, that and the carry with the auxiliary terms, which are computed in training mode alone."""
        logits_BTE = self.router(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)))
        scores_BTE, chosen_BTK, weight_BTK = self._choose(logits_BTE)
        out_BTD = self.experts(x_BTD, chosen_BTK, weight_BTK)
        if self.config.n_shared:
            out_BTD = out_BTD + self.shared_down(F.silu(self.shared_gate(x_BTD)) * self.shared_up(x_BTD))
        if carry is None:
            return out_BTD
        return out_BTD, self._with_terms(carry, logits_BTE, scores_BTE, chosen_BTK) if self.training else carry

    def _choose(self, logits_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B, T, E], the experts of each token [B, T, K] and their weights."""
        config = self.config
        scores_BTE = logits_BTE.softmax(-1) if config.scores == "softmax" else logits_BTE.sigmoid()
        preference_BTE = scores_BTE.detach()
        if config.bias_rate:
            preference_BTE = preference_BTE + self.bias_E.to(preference_BTE.device)
        chosen_BTK = preference_BTE.topk(config.top_k, dim=-1).indices
        weight_BTK = scores_BTE.gather(-1, chosen_BTK)
        if config.normalize:
            weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdim=True) + 1e-20)
        return scores_BTE, chosen_BTK, weight_BTK * config.scaling_factor

    def _with_terms(self, carry: Carry, logits_BTE: Tensor, scores_BTE: Tensor, chosen_BTK: Tensor) -> Carry:
        config, dtype = self.config, logits_BTE.dtype
        count_BE = count_of(chosen_BTK.flatten(1), config.n_experts).to(dtype)
        count_E = count_BE.sum(0)
        if config.bias_rate:
            with torch.no_grad():
                self.tokens_E.add_(count_E.to(self.tokens_E.device))
        if config.balance_weight:
            probability_BTE = scores_BTE if config.scores == "softmax" else scores_BTE / scores_BTE.sum(-1, keepdim=True)
            carry = self._with_loss(carry, "moe_balance", self._balance(probability_BTE, count_BE), config.balance_weight)
        if config.z_weight:
            carry = self._with_loss(carry, "moe_z", logits_BTE.logsumexp(-1).square().mean(), config.z_weight)
        carry = carry.with_aux("moe_imbalance", count_E.max() / count_E.mean(), 1.0, 0.0)
        return carry.with_aux("moe_dropped", torch.zeros_like(count_E[0]), 1.0, 0.0)

    def _balance(self, probability_BTE: Tensor, count_BE: Tensor) -> Tensor:
        """E sum_e f_e P_e with f the share of the choices and P the mean probability: of all tokens, or the mean over rows."""
        if self.config.balance_over == "row":
            count_XE, probability_XE = self.counts.over_rows(count_BE), probability_BTE.mean(1)
        else:
            count_XE, probability_XE = self.counts.over_batch(count_BE.sum(0, keepdim=True)), probability_BTE.mean((0, 1))[None]
        share_XE = count_XE / count_XE.sum(-1, keepdim=True)
        return self.config.n_experts * (share_XE * probability_XE).sum(-1).mean()

    def _with_loss(self, carry: Carry, name: str, value: Tensor, weight: float) -> Carry:
        """Losses add up over blocks, so the first alone counts as one."""
        if self.share != 1.0:
            value = value * self.share + (value * (1 - self.share)).detach()
        return carry.with_aux(name, value, 0.0 if name in carry.aux else 1.0, weight)

    @torch.no_grad()
    def after_update(self) -> None:
        """Move the bias of each expert up where it got fewer tokens than the mean since the last update, on all processes; else down."""
        if not self.config.bias_rate:
            return
        tokens_E = self.counts.over_batch(self.tokens_E)
        self.bias_E.add_(torch.sign(tokens_E.mean() - tokens_E), alpha=self.config.bias_rate)
        self.tokens_E.zero_()

    @torch.no_grad()
    def after_skip(self) -> None:
        """Forget the tokens counted since the last update."""
        if self.config.bias_rate:
            self.tokens_E.zero_()
