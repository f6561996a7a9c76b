"""Optimizers on whole tensors: numbers against closed forms, groups by role, states."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from titanarch.config.errors import ConfigError
from titanarch.contract.roles import EMBEDDING, HEAD, HIDDEN, VECTOR, Role, roles_of
from titanarch.train.muon import orthogonalize
from titanarch.train.optimizers import OPTIMIZERS, AdamConfig, AdamWConfig, MuonConfig, OptimizerConfig, SGDConfig, build_optimizers

ROLES = {"table": EMBEDDING, "matrix": HIDDEN, "gain": VECTOR, "fast": HIDDEN.with_lr_group("inner"), "head": HEAD}
SHAPES = {"table": (7, 4), "matrix": (4, 6), "gain": (4,), "fast": (6, 4), "head": (4, 7)}
MULTIPLIERS = {"inner": 3.0}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + sorted(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


FACTORS = (0.25, 1.0, 1.0, 0.5)


def trained(config: OptimizerConfig) -> dict[str, nn.Parameter]:
    """Four steps at changing learning rates."""
    held = parameters()
    optimizers = build_optimizers(config, held.items(), ROLES)
    for step, factor in enumerate(FACTORS):
        optimizers.set_lr(factor)
        assert optimizers.lr == config.lr * factor
        for name, parameter in held.items():
            parameter.grad = gradient(name, step)
        optimizers.step()
        optimizers.zero_grad()
        assert all(p.grad is None for p in held.values())
    return held


def adam_by_hand(name: str, lr: float, decay: float, *, decoupled: bool) -> Tensor:
    """Kingma and Ba's algorithm 1, and Loshchilov and Hutter's decay, as printed."""
    theta = parameters()[name].detach().clone()
    m, v, beta1, beta2, eps = torch.zeros_like(theta), torch.zeros_like(theta), 0.8, 0.9, 1e-6
    for t, factor in enumerate(FACTORS, start=1):
        g = gradient(name, t - 1) + (0 if decoupled else decay) * theta
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        shrunk = theta * (1 - lr * factor * decay) if decoupled else theta
        theta = shrunk - lr * factor * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return theta


def lr_and_decay(name: str, lr: float, decay: float) -> tuple[float, float]:
    return lr * (3.0 if name == "fast" else 1.0), 0.0 if name == "gain" else decay


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize(("config", "decoupled"), [(AdamWConfig, True), (AdamConfig, False)])
def test_adam_and_adamw(config: type[AdamConfig], decoupled: bool, implementation: str) -> None:
    table = {"lr": 0.1, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "lr_multipliers": MULTIPLIERS}
    held = trained(config.model_validate({**table, "implementation": implementation}))
    for name, parameter in held.items():
        lr, decay = lr_and_decay(name, 0.1, 0.3)
        torch.testing.assert_close(parameter.detach(), adam_by_hand(name, lr, decay, decoupled=decoupled), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(implementation: str, nesterov: bool) -> None:
    table = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.7, "nesterov": nesterov, "lr_multipliers": MULTIPLIERS}
    held = trained(SGDConfig.model_validate({**table, "implementation": implementation}))
    for name, parameter in held.items():
        lr, decay = lr_and_decay(name, 0.1, 0.3)
        theta = parameters()[name].detach().clone()
        velocity = torch.zeros_like(theta)
        for step, factor in enumerate(FACTORS):
            g = gradient(name, step) + decay * theta
            velocity = 0.7 * velocity + g
            theta = theta - lr * factor * (g + 0.7 * velocity if nesterov else velocity)
        torch.testing.assert_close(parameter.detach(), theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(adjust_lr_fn: str, nesterov: bool) -> None:
    """Hidden matrices as torch's Muon does them alone, all others as AdamW at its own learning rate."""
    table: dict[str, Any] = {"lr": 0.1, "adamw_lr": 0.02, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6}
    options = {"adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov, "momentum": 0.9, "ns_steps": 4}
    held = trained(MuonConfig.model_validate({**table, **options, "lr_multipliers": MULTIPLIERS}))
    for name in ("matrix", "fast"):
        lr = 0.3 if name == "fast" else 0.1
        reference = parameters()[name]
        muon = torch.optim.Muon([reference], lr=lr, weight_decay=0.3, **options)
        for step, factor in enumerate(FACTORS):
            muon.param_groups[0]["lr"] = lr * factor
            reference.grad = gradient(name, step)
            muon.step()
        torch.testing.assert_close(held[name], reference, rtol=1e-9, atol=1e-9)
    for name in ("table", "gain", "head"):
        lr, decay = lr_and_decay(name, 0.02, 0.3)
        torch.testing.assert_close(held[name].detach(), adam_by_hand(name, lr, decay, decoupled=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_orthogonalize_acts_on_singular_values(shape: tuple[int, int]) -> None:
    """In fp64, on the singular values alone: each passes five times through the odd quintic."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrix, 5).double(), (u * s) @ vh, rtol=0, atol=0.03)


def decays(config: OptimizerConfig) -> set[str]:
    """Names of the parameters that a step with zero gradients shrinks."""
    held = parameters()
    optimizers = build_optimizers(config, held.items(), ROLES)
    for parameter in held.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    return {name for name, parameter in held.items() if not torch.equal(parameter, parameters()[name])}


def test_weight_decay_follows_roles() -> None:
    base = {"lr": 0.1, "lr_multipliers": MULTIPLIERS}
    assert decays(AdamWConfig.model_validate(base)) == {"table", "matrix", "fast", "head"}
    assert decays(AdamWConfig.model_validate({**base, "decay_embeddings": False})) == {"matrix", "fast", "head"}
    assert decays(AdamWConfig.model_validate({**base, "decay_all": True})) == set(SHAPES)
    assert decays(AdamWConfig.model_validate({**base, "weight_decay": 0.0})) == set()
    with pytest.raises(ValidationError, match="decay_all"):
        AdamWConfig.model_validate({**base, "decay_all": True, "decay_embeddings": False})


def test_learning_rate_groups_must_match_the_model() -> None:
    held = parameters()
    with pytest.raises(ConfigError, match=r"lr_multipliers.*group 'inner' of fast: add inner = 1.0"):
        build_optimizers(AdamWConfig(lr=0.1), held.items(), ROLES)
    with pytest.raises(ConfigError, match=r"innner: no parameter is in this learning-rate group; did you mean 'inner'"):
        build_optimizers(AdamWConfig(lr=0.1, lr_multipliers={"inner": 1.0, "innner": 1.0}), held.items(), ROLES)
    with pytest.raises(ConfigError, match="no hidden matrix for Muon"):
        build_optimizers(MuonConfig(lr=0.1, adamw_lr=0.1), [("gain", held["gain"])], ROLES)
    with pytest.raises(ValueError, match=r"gain: .*muon=True.*\(4,\)"):
        build_optimizers(AdamWConfig(lr=0.1), [("gain", held["gain"])], {"gain": HIDDEN})
    optimizers = build_optimizers(MuonConfig(lr=0.1, adamw_lr=0.1), [("matrix", held["matrix"])], ROLES)
    assert len(optimizers.torch_optimizers) == 1


def test_default_multiplier_scales_the_default_group() -> None:
    held = parameters()
    optimizers = build_optimizers(SGDConfig(lr=0.5, lr_multipliers={"default": 0.5, "inner": 1.0}), held.items(), ROLES)
    for parameter in held.values():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    for name, parameter in held.items():
        torch.testing.assert_close(parameter.detach(), parameters()[name].detach() - (0.5 if name == "fast" else 0.25))


def test_parameters_without_gradient_are_left_out() -> None:
    held = parameters()
    held["fast"].requires_grad_(False)
    optimizers = build_optimizers(SGDConfig(lr=0.5), held.items(), ROLES)  # no group 'inner' is left to name
    assert sum(len(g["params"]) for g in optimizers.torch_optimizers[0].param_groups) == len(SHAPES) - 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("AdmaW", "did you mean 'AdamW'"),
        ({"name": "AdamW"}, "lr"),
        ({"name": "AdamW", "lr": 0.1, "momentum": 0.9}, "momentum"),
        ({"name": "AdamW", "lr": 0.0}, "greater than 0"),
        ({"name": "SGD", "lr": 0.1, "nesterov": True}, "momentum above 0"),
        ({"name": "Muon", "lr": 0.1}, "adamw_lr"),
    ],
)
def test_wrong_tables(value: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        OPTIMIZERS.resolve(value)


def test_table_by_name() -> None:
    config = OPTIMIZERS.resolve({"name": "AdamW", "lr": 8e-4, "beta2": 0.99, "implementation": "foreach"})
    assert config == AdamWConfig(lr=8e-4, beta2=0.99, implementation="foreach")
    assert config.model_dump()["name"] == "AdamW"
    assert config.model_dump()["weight_decay"] == 0.1


class Small(nn.Module):
    roles: ClassVar[dict[str, Role]] = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.inner(self.embed(tokens))).square().mean()


CONFIGS: list[Callable[[float], OptimizerConfig]] = [
    lambda decay: AdamWConfig(lr=0.01, weight_decay=decay),
    lambda decay: AdamConfig(lr=0.01, weight_decay=decay, implementation="foreach"),
    lambda decay: SGDConfig(lr=0.01, momentum=0.9, weight_decay=decay),
    lambda decay: MuonConfig(lr=0.01, adamw_lr=0.01, weight_decay=decay),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_states_survive_a_checkpoint_bitwise(config: Callable[[float], OptimizerConfig]) -> None:
    """Saved through DCP's state dict, loaded by fresh optimizers, the next steps are bitwise the same."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def run(model: nn.Module, optimizers: Any, first: int, last: int) -> None:
        for step in range(first, last):
            optimizers.set_lr(1 / (step + 1))
            model(torch.arange(step, step + 5)).backward()
            optimizers.step()
            optimizers.zero_grad()

    model = Small()
    optimizers = build_optimizers(config(0.1), model.named_parameters(), roles_of(model))
    run(model, optimizers, 0, 3)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizers.torch_optimizers, options=options)))
    run(model, optimizers, 3, 6)

    other = Small()
    again = build_optimizers(config(0.1), other.named_parameters(), roles_of(other))
    other.load_state_dict(saved[0])
    set_optimizer_state_dict(other, again.torch_optimizers, saved[1], options=options)
    run(other, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    third = build_optimizers(config(0.7), other.named_parameters(), roles_of(other))
    third.set_lr(0.5)
    set_optimizer_state_dict(other, third.torch_optimizers, saved[1], options=options)
    groups = [group for o in third.torch_optimizers for group in o.param_groups]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.7}, "the configuration decides, not the checkpoint"
    assert {group["lr"] for group in groups} == {0.005}
