"""[optimizer]: which optimizer, and which parameters get which learning rate and weight decay."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from titanarch.config.errors import ConfigError, Problem, did_you_mean
from titanarch.config.registry import ComponentConfig, Registry
from titanarch.contract.growth import Growth
from titanarch.contract.roles import Kind, Role
from titanarch.train.local_optimizers import LocalAdam, LocalSGD
from titanarch.train.muon import LocalMuon
from titanarch.train.update import Optimizers

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Implementation = Literal["fused", "foreach", "for-loop"]

DEFAULT_GROUP = "default"


class OptimizerConfig(ComponentConfig):
    """[optimizer]; ``name`` picks the optimizer."""

    takes_mup: ClassVar[bool] = False

    lr: Positive = Field(description="learning rate that the schedule multiplies")
    weight_decay: NonNegative = Field(0.1, description="decay of parameters whose role takes it: matrices and tables, not gains and biases")
    implementation: Implementation = Field("fused", description="of the elementwise update: one kernel, lists of tensors, or one by one")
    decay_embeddings: bool = Field(True, description="whether token and position tables take weight decay")
    decay_all: bool = Field(False, description="whether every parameter takes weight decay, gains and biases too")
    lr_multipliers: dict[str, Positive] = Field(
        default_factory=dict, description="learning rate of each group that the model declares, as a multiple of lr; default = 1"
    )
    parametrization: Literal["standard", "mup"] = Field(
        "standard",
        description="mup: maximal update, whose lr holds at every width; initial weights and the scale of attention change with it",
    )
    mup_base: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of [model] at the base width, at which mup changes nothing, such as { d_model = 128, n_heads = 2 }",
    )

    @model_validator(mode="after")
    def _one_decay_rule(self) -> Self:
        if self.decay_all and not self.decay_embeddings:
            raise ValueError("decay_all = true decays the embeddings too: remove decay_embeddings = false, or decay_all")
        return self

    @model_validator(mode="after")
    def _a_base_for_mup(self) -> Self:
        if self.parametrization == "mup" and not self.mup_base:
            raise ValueError("parametrization = 'mup' needs mup_base, the keys of [model] at the base width")
        if self.parametrization != "mup" and self.mup_base:
            raise ValueError("mup_base does nothing without parametrization = 'mup': add that, or remove mup_base")
        if self.parametrization == "mup" and not self.takes_mup:
            raise ValueError(f"mup is defined here for Adam and AdamW, not for '{self.kind}'; use one of them")
        return self

    @property
    def fused(self) -> bool:
        return self.implementation == "fused"

    @property
    def foreach(self) -> bool:
        return self.implementation == "foreach"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate, a weight decay and an algorithm."""

    decay: bool
    lr_multiplier: float
    muon: bool
    parameters: list[Tensor]

    def options(self, *, lr: float, weight_decay: float) -> dict[str, Any]:
        """The group as torch's optimizers take it."""
        return {"params": self.parameters, "lr": lr * self.lr_multiplier, "weight_decay": weight_decay if self.decay else 0.0}


class OptimizerKind(ABC):
    """What can be registered as an optimizer."""

    Config: ClassVar[type[OptimizerConfig]]

    @staticmethod
    @abstractmethod
    def build(config: OptimizerConfig, groups: list[ParameterGroup]) -> list[torch.optim.Optimizer]:
        """torch's optimizers, which together hold every group."""


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer", key="name")
optimizer = OPTIMIZERS.register


class AdamFields(OptimizerConfig):
    """What every optimizer with Adam in it has."""

    beta1: Beta = Field(0.9, description="Adam's decay of the mean of gradients, per step")
    beta2: Beta = Field(0.95, description="Adam's decay of the mean of squared gradients, per step")
    eps: Positive = Field(1e-8, description="Adam's term added to the root of the mean square")

    def adam(self, groups: list[ParameterGroup], *, lr: float, decoupled: bool) -> LocalAdam:
        """Adam on ``groups``, AdamW if ``decoupled``."""
        return LocalAdam(
            [group.options(lr=lr, weight_decay=self.weight_decay) for group in groups],
            lr=lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            decoupled_weight_decay=decoupled,
            fused=self.fused,
            foreach=self.foreach,
        )


class AdamConfig(AdamFields):
    """Adam (arXiv:1412.6980); its weight decay is added to the gradient."""

    takes_mup = True

    weight_decay: NonNegative = Field(0.0, description="L2 penalty added to the gradient of parameters whose role takes decay")


@optimizer("Adam")
class Adam(OptimizerKind):
    Config = AdamConfig

    @staticmethod
    def build(config: OptimizerConfig, groups: list[ParameterGroup]) -> list[torch.optim.Optimizer]:
        assert isinstance(config, AdamConfig), "the registry pairs Adam with AdamConfig"
        return [config.adam(groups, lr=config.lr, decoupled=False)]


class AdamWConfig(AdamFields):
    """AdamW (arXiv:1711.05101): weights shrink by lr * weight_decay a step, with mup by the lr of their width."""

    takes_mup = True


@optimizer("AdamW")
class AdamW(OptimizerKind):
    Config = AdamWConfig

    @staticmethod
    def build(config: OptimizerConfig, groups: list[ParameterGroup]) -> list[torch.optim.Optimizer]:
        assert isinstance(config, AdamWConfig), "the registry pairs AdamW with AdamWConfig"
        return [config.adam(groups, lr=config.lr, decoupled=True)]


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; its weight decay is added to the gradient."""

    weight_decay: NonNegative = Field(0.0, description="L2 penalty added to the gradient of parameters whose role takes decay")
    momentum: Beta = Field(0.0, description="decay of the sum of gradients, per step")
    nesterov: bool = Field(False, description="whether to look one step ahead along the momentum")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs a momentum above 0")
        return self


@optimizer("SGD")
class SGD(OptimizerKind):
    Config = SGDConfig

    @staticmethod
    def build(config: OptimizerConfig, groups: list[ParameterGroup]) -> list[torch.optim.Optimizer]:
        assert isinstance(config, SGDConfig), "the registry pairs SGD with SGDConfig"
        options = [group.options(lr=config.lr, weight_decay=config.weight_decay) for group in groups]
        return [
            LocalSGD(options, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=config.fused, foreach=config.foreach)
        ]


class MuonConfig(AdamFields):
    """Muon for hidden matrices, AdamW for embeddings, head, gains and biases; ``implementation`` is AdamW's."""

    momentum: Beta = Field(0.95, description="decay of Muon's mean of gradients, per step")
    nesterov: bool = Field(True, description="whether Muon looks one step ahead along the momentum")
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = Field(5, description="Newton-Schulz iterations of a step")
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="lr of an A x B matrix: times 0.2 sqrt(max(A, B)), so that AdamW's lr and decay serve; or times sqrt(max(1, A/B))",
    )
    adamw_lr: Positive = Field(description="learning rate of the parameters left to AdamW")


@optimizer("Muon")
class Muon(OptimizerKind):
    Config = MuonConfig

    @staticmethod
    def build(config: OptimizerConfig, groups: list[ParameterGroup]) -> list[torch.optim.Optimizer]:
        assert isinstance(config, MuonConfig), "the registry pairs Muon with MuonConfig"
        matrices = [group.options(lr=config.lr, weight_decay=config.weight_decay) for group in groups if group.muon]
        others = [group for group in groups if not group.muon]
        if not matrices:
            raise ConfigError(Problem("the model declares no hidden matrix for Muon; use 'AdamW'", key="optimizer.name"))
        muon = LocalMuon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr_fn,
        )
        return [muon, config.adam(others, lr=config.adamw_lr, decoupled=True)] if others else [muon]


def build_optimizers(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    roles: Mapping[str, Role],
    growth: Mapping[str, Growth] | None = None,
) -> Optimizers:
    """The optimizers of a model's parameters; those that need no gradient are left out.

    ``named_parameters``: by the names that ``roles`` and ``growth`` use; ``growth``: see contract.width. Raises ConfigError where a
    parameter's learning-rate group has no multiplier, or a multiplier has no parameter.
    """
    trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    multipliers = _multipliers(config, {name: roles[name].lr_group for name in trained})
    groups: dict[tuple[bool, float, bool], ParameterGroup] = {}
    for name, parameter in trained.items():
        role = roles[name]
        if role.muon and parameter.dim() != 2:
            raise ValueError(f"{name}: a role with muon=True is for matrices, and this has the shape {tuple(parameter.shape)}")
        decay = config.decay_all or (role.decay and (config.decay_embeddings or role.kind is not Kind.EMBEDDING))
        lr_multiplier = multipliers[role.lr_group] * (growth[name].lr_factor if growth else 1.0)
        group = groups.setdefault((decay, lr_multiplier, role.muon), ParameterGroup(decay, lr_multiplier, role.muon, []))
        group.parameters.append(parameter)
    return Optimizers(OPTIMIZERS.of(config).build(config, list(groups.values())), config.lr)


def _multipliers(config: OptimizerConfig, group_of: Mapping[str, str]) -> dict[str, float]:
    """Each group's multiplier; ``group_of``: the group of each parameter."""
    given = {DEFAULT_GROUP: 1.0, **config.lr_multipliers}
    declared = {DEFAULT_GROUP, *group_of.values()}
    problems = []
    for group in sorted(declared - given.keys()):
        names = [name for name, its_group in group_of.items() if its_group == group]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        problems.append(
            Problem(f"no multiplier for the learning-rate group '{group}' of {shown}: add {group} = 1.0", key="optimizer.lr_multipliers")
        )
    problems += [
        Problem(f"no parameter is in this learning-rate group{did_you_mean(group, declared)}", key=f"optimizer.lr_multipliers.{group}")
        for group in sorted(given.keys() - declared)
    ]
    if problems:
        raise ConfigError(*problems)
    return given
