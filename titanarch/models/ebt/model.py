"""The energy-based transformer (arXiv:2507.02092): predictions go down the gradient of a learned energy.

A prediction is a distribution over the vocabulary, kept as logits p [B, T, V]. From a start p0,

    s = softmax(p),    e = s W,    p <- s - a dE(e; contexts) / ds,    loss = cross-entropy of p after each step

where E is a transformer that reads T contexts and T predictions and gives a number for each prediction. Training differentiates
through the step, so second derivatives of E train it. The authors' code is github.com/alexiglad/EBT; like it, a step starts from s and
differentiates by s. By the logits, p <- p - a dE / dp, each change would be a probability, about 1 / V, times something.

Shapes: B rows, T tokens, D model dim, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from titanarch.contract.card import Card
from titanarch.contract.cost import Cost, linear_cost
from titanarch.contract.init import Init
from titanarch.contract.layers import local
from titanarch.contract.model import Model, Objective, Technique, model
from titanarch.contract.norm import NORMS
from titanarch.contract.roles import VECTOR, Role
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Aux
from titanarch.models.ebt.attention import LayerContext
from titanarch.models.ebt.config import SIZES, EBTConfig
from titanarch.models.ebt.landscape import EnergyBlock, Landscape
from titanarch.models.ebt.refinement import Scored, descended, embedded, first_prediction, shaken, size_factors, step_counts
from titanarch.ops.cross_entropy import IGNORED

SMALLEST_STEP = 1e-4
"""A learned step size is held above this."""


class Step(NamedTuple):
    """A refinement step: what came of it; of each row, [B], whether it took it, and its weight in the objective and the loss reported."""

    scored: Scored
    is_taken_B: Tensor
    objective_B: Tensor
    reported_B: Tensor


@model("ebt")
class EBT(Model):
    """Token embedding, landscape of blocks, a step size. The loss that is reported is that of the last step.

    Memory: of each step the logits [B, T, V] in fp32, and in each block [B, H, T, T] several times.
    """

    Config = EBTConfig
    card = Card(
        "Energy-based transformer: predictions refined by gradient descent on a learned energy",
        "arXiv:2507.02092",
        "dense-mask attention over both streams, autograd.grad(create_graph=True)",
    )
    flavors = SIZES
    fsdp_units = "root"
    refuses: ClassVar[Mapping[Technique, str]] = {
        "tensor_parallel": "it differentiates its energy in its forward, and the collectives of tensor parallelism have one derivative",
        "context_parallel": "it differentiates its energy in its forward, and the collectives of context parallelism have one derivative",
        "recomputation": "it differentiates its energy in its forward by torch.func.grad, under which nothing can be recomputed",
        "float8": "its matrices are differentiated twice, and scaled products have one derivative",
    }
    roles: dict[str, Role] = {"step_size": VECTOR.with_lr_group("step_size")}

    def __init__(self, config: EBTConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len)
        self.config = config
        self.shape = config.shape(vocab_size, seq_len)
        V, D = self.shape.vocab_size, self.shape.d_model
        self.embedding = nn.Embedding(V, D)
        self.prediction = nn.Embedding(V, D) if config.prediction_embedding == "linear" else None
        self.landscape = Landscape(config, self.shape)
        self.step_size = nn.Parameter(torch.empty(1)) if config.learn_step_size else None

    @staticmethod
    def cost(config: EBTConfig, vocab_size: int, seq_len: int) -> Cost:
        """Parameters, and a third of what a token's training costs, so that three times the figure is what is computed.

        Contexts cost 3 forwards C where they are differentiated, else 1. A step's energy costs a forward P; the gradient by its
        input as much again, one product for each product; and the backward of both 4 P, so 6 P, or 2 P where nothing is
        differentiated. The vocabulary costs 2 V D for e and 2 V D for u W^T, and in the backward 2 V D for W, u, W and, where p
        has a gradient, p. What the backward computes again is not counted, as with activation checkpointing.
        """
        shape, mixer = config.shape(vocab_size, seq_len), config.attention
        V, D, H, K = shape.vocab_size, shape.d_model, mixer.n_heads, mixer.channels_per_head(shape.d_model)
        n_tables = 2 if config.prediction_embedding == "linear" else 1
        blocks = [EnergyBlock.cost(config, shape, layer) for layer in range(shape.n_layers)]
        whole = sum(block.forward_flops_per_token for block in blocks)
        own_key = 4.0 * H * K
        last = linear_cost(D, (H + 2 * mixer.kv_heads()) * K).forward_flops_per_token
        context = whole - blocks[-1].forward_flops_per_token + last + own_key * config.step_embedding * (shape.n_layers - 1)
        prediction = whole + own_key * (1 + config.step_embedding) * shape.n_layers + 2.0 * D
        is_last_alone = config.loss == "last" and config.detach
        n_through = config.random_steps + 1 if is_last_alone else config.most_steps
        n_landscapes = config.n_steps if config.step_embedding else 1
        n_contexts_through = 1 if is_last_alone else n_landscapes
        n_with_gradient = 0 if config.detach else config.most_steps - 1
        training = context * (2 * n_contexts_through + n_landscapes)
        training += prediction * (4 * n_through + 2 * config.most_steps)
        training += 2.0 * V * D * (3 * n_through + 2 * config.most_steps + n_with_gradient)
        parameters = sum(block.parameters for block in blocks) + n_tables * V * D + D + config.learn_step_size
        parameters += NORMS.of(config.norm).n_parameters(config.final_norm, D) + config.n_steps * D * config.step_embedding
        return Cost(parameters=parameters, embedding_parameters=n_tables * V * D, forward_flops_per_token=training / 3)

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.landscape.layers)

    def compiled(self) -> Iterator[nn.Module]:
        """The blocks as contexts go through them, and the landscape with its gradient as one graph."""
        yield from self.landscape.layers
        yield self.landscape

    def reset_parameters(self, init: Init) -> None:
        """Both tables as embeddings of the scheme, step_size as configured; the landscape its own."""
        init.embedding(self.embedding)
        if self.prediction is not None:
            init.embedding(self.prediction)
        if self.step_size is not None:
            init.constant(self, "step_size", self.config.step_size)
        self.landscape.reset_parameters(init)

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        total = loss_sum = z_sum = torch.zeros((), device=tokens_BT.device)
        count, first = (labels_BT != IGNORED).sum(), None
        for step in self._steps(tokens_BT, seq, labels_BT):
            cost_BT = step.scored.loss_BT + z_weight * step.scored.z_BT if z_weight else step.scored.loss_BT
            total = total + (cost_BT * step.objective_B[:, None]).sum()
            loss_BT, z_BT = step.scored.loss_BT.detach(), step.scored.z_BT.detach()
            first = loss_BT.sum() if first is None else first
            loss_sum = loss_sum + (loss_BT * step.reported_B[:, None]).sum()
            z_sum = z_sum + (z_BT * step.reported_B[:, None]).sum()
        assert first is not None, "there is at least one step"
        aux = {"loss_after_one_step": Aux(first, count.clamp(min=1).to(first.dtype), 0.0)}
        if self.step_size is not None:
            aux["step_size"] = Aux(self._size().detach().float().sum(), torch.ones((), device=tokens_BT.device), 0.0)
        return Objective(total, loss_sum, z_sum, count, aux)

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        return self._refined(tokens_BT, seq, labels_BT).loss_BT

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        return self._refined(tokens_BT, seq, torch.full_like(tokens_BT, IGNORED)).p_BTV

    def _refined(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Scored:
        """What each row has after the last step that it took."""
        steps = self._steps(tokens_BT, seq, labels_BT)
        refined = next(steps).scored  # every row takes the first
        for step in steps:
            after = zip(step.scored, refined, strict=True)
            refined = Scored(*(torch.where(step.is_taken_B.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in after))
        return refined

    def _steps(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Iterator[Step]:
        """The steps of a forward, one after the other."""
        config, with_gradient = self.config, torch.is_grad_enabled()
        n_steps = config.most_steps if seq.seed is not None else config.eval_steps or config.most_steps
        count_B = step_counts(seq, config.n_steps, config.random_steps) if seq.seed is not None else torch.full_like(seq.row_B, n_steps)
        x_BTD = self.vocabulary.embed(tokens_BT, self.embedding.weight)
        weight_VD = local((self.embedding if self.prediction is None else self.prediction).weight)
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        p_BTV = first_prediction((*tokens_BT.shape, self.shape.vocab_size), seq, start=config.start, dtype=dtype)
        contexts: tuple[LayerContext, ...] = ()
        # A row's last step is none before this one.
        first_through = min(n_steps, config.n_steps) - 1 if config.detach and config.loss == "last" else 0
        for number in range(n_steps):
            through = with_gradient and number >= first_through
            if number == 0 or (config.step_embedding and number < config.n_steps):
                # Without a step embedding what is read here serves every step.
                with torch.set_grad_enabled(with_gradient and (through or not config.step_embedding)):
                    contexts = self.landscape.read(x_BTD, seq, number)
            is_taken_B = number < count_B
            with torch.set_grad_enabled(through):
                p_BTV = shaken(p_BTV.detach() if config.detach else p_BTV, seq, config.langevin_noise, number)
                u_BTD, _ = self.landscape(embedded(p_BTV, weight_VD), contexts, seq)
                u_BTD = u_BTD if self.output_multiplier == 1 else u_BTD * self.output_multiplier  # of the energy, and so of u
                size_BT = self._size().to(dtype) * size_factors(seq, config.random_step_scale, number, dtype) * is_taken_B[:, None]
                scored = descended(p_BTV, u_BTD, weight_VD, size_BT, labels_BT, gradient_by=config.gradient_by)
            is_last_B = (count_B == number + 1).to(dtype)
            objective_B = is_last_B if config.loss == "last" else is_taken_B / count_B.to(dtype)
            yield Step(scored, is_taken_B, objective_B, is_last_B)
            p_BTV = scored.p_BTV

    def _size(self) -> Tensor:
        """[1]"""
        if self.step_size is None:
            return torch.full((1,), self.config.step_size, device=self.embedding.weight.device)
        return local(self.step_size).clamp(min=SMALLEST_STEP)
