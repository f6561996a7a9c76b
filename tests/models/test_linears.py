"""Monarch layers against the dense matrix that their factors assemble, and linear layers in channel mixers."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import materialized, n_parameters, shape
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.contract.channel import CHANNELS
from titanarch.contract.init import Init
from titanarch.contract.layers import Linear
from titanarch.contract.linear import LINEARS
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.channels.hidden import HiddenChannel
from titanarch.models.decoder import Decoder
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.linears.monarch import Monarch, MonarchConfig, assembled, monarch, projected
from titanarch.parallel.check import why_not_divided
from titanarch.train.optimizers import build_optimizers
from titanarch.train.run_config import RunConfig

SEQ = SequenceInfo.whole(2, 6)
SIZES = [(32, 32, 4), (32, 80, 4), (80, 32, 4), (16, 24, 2), (16, 16, 4)]
"""Inputs, outputs and blocks; in the last, slices have rank 1."""


def layer(d_in: int, d_out: int, n_blocks: int, *, init: str = "unit", bias: bool = False) -> Monarch:
    config = MonarchConfig.model_validate({"n_blocks": n_blocks, "init": init})
    module = Wrapped(config, d_in, d_out, bias=bias)
    cost = Monarch.cost(config, d_in, d_out, bias=bias)
    built = materialized(lambda: module)
    assert n_parameters(built) == cost.parameters
    assert cost.forward_flops_per_token == 2 * (cost.parameters - bias * d_out)
    return built


class Wrapped(Monarch):
    """With the method's name that components have."""

    def reset_parameters(self, init: Init) -> None:
        self.reset(init)


@pytest.mark.parametrize(("d_in", "d_out", "n_blocks"), SIZES)
def test_outputs_and_gradients_are_those_of_the_assembled_matrix(d_in: int, d_out: int, n_blocks: int) -> None:
    module = layer(d_in, d_out, n_blocks, bias=True).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.get_parameter("bias").normal_(generator=generator)
    x = torch.randn(2, 5, d_in, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 5, d_out, generator=generator, dtype=torch.float64)
    matrix = monarch(torch.eye(d_in, dtype=torch.float64), module.right_KQP, module.left_KSQ).T
    assert (assembled(module.right_KQP, module.left_KSQ) - matrix).abs().max() < 1e-12
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad((module(x) * w).sum(), leaves)
    expected = x @ assembled(module.right_KQP, module.left_KSQ).T + module.get_parameter("bias")
    assert (module(x) - expected).abs().max() < 1e-12
    for found, wanted in zip(grads, torch.autograd.grad((expected * w).sum(), leaves), strict=True):
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-12


def test_every_output_depends_on_every_input() -> None:
    for d_in, d_out, n_blocks in SIZES:
        module = layer(d_in, d_out, n_blocks)
        assert (assembled(module.right_KQP, module.left_KSQ) != 0).all()


@pytest.mark.parametrize(("d_in", "d_out", "n_blocks"), SIZES)
def test_projection_is_the_nearest(d_in: int, d_out: int, n_blocks: int) -> None:
    """It is the identity on Monarch matrices; elsewhere what is lost are the small singular values of each slice, and no step mends it."""
    dense = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right, left = projected(dense, n_blocks)
    near = assembled(right, left)
    again = assembled(*projected(near, n_blocks))
    assert (again - near).abs().max() < 1e-10
    K, rank = n_blocks, min(d_in, d_out) // n_blocks**2
    lost = 0.0
    for output in range(K):
        for k in range(K):
            part = dense[output::K, k * d_in // K : (k + 1) * d_in // K]
            lost += float(torch.linalg.svdvals(part)[rank:].square().sum())
            fitted = near[output::K, k * d_in // K : (k + 1) * d_in // K]
            assert torch.linalg.matrix_rank(fitted, rtol=1e-9) == rank
    assert float((near - dense).square().sum()) == pytest.approx(lost, rel=1e-9)
    right.requires_grad_(), left.requires_grad_()
    grads = torch.autograd.grad((assembled(right, left) - dense).square().sum(), [right, left])
    assert max(float(g.abs().max()) for g in grads) < 1e-9


@pytest.mark.parametrize(("init", "variance"), [("unit", 1.0), ("fly", 1 / 9), ("dense", 0.02**4 * 128 * 128)])
def test_initial_variance(init: str, variance: float) -> None:
    module = layer(512, 512, 4, init=init)
    y = module(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    assert float(y.detach().var()) == pytest.approx(variance, rel=0.05)


def test_residual_outputs_are_divided_by_depth() -> None:
    config = CHANNELS.resolve({"kind": "mlp", "linear": {"kind": "monarch"}})
    module = materialized(lambda: CHANNELS.of(config)(config, shape(128), 0))
    std = {name: float(p.detach().std()) for name, p in module.named_parameters()}
    assert std["up.left_KSQ"] == pytest.approx(1 / math.sqrt(32), rel=0.05)
    assert std["down.left_KSQ"] == pytest.approx(1 / math.sqrt(32) / math.sqrt(2 * 2), rel=0.05)
    assert std["down.right_KQP"] == pytest.approx(1 / math.sqrt(128), rel=0.05)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_in_a_channel_mixer(kind: str) -> None:
    """Equal to the one of dense layers that hold the assembled matrices; a learning-rate group of its own, no decay, no division."""
    table = {"kind": kind, "d_ff": 48, "bias": True}
    config, plain = CHANNELS.resolve({**table, "linear": "monarch"}), CHANNELS.resolve(table)
    module = materialized(lambda: CHANNELS.of(config)(config, shape(32), 0)).double()
    dense = materialized(lambda: CHANNELS.of(plain)(plain, shape(32), 0)).double()
    assert isinstance(module, HiddenChannel)
    assert CHANNELS.of(config).cost(config, shape(32)).parameters == n_parameters(module)
    for name, child in module.named_children():
        if isinstance(child, Monarch):
            linear = dense.get_submodule(name)
            assert isinstance(linear, Linear)
            with torch.no_grad():
                linear.weight.copy_(assembled(child.right_KQP, child.left_KSQ))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (module(x, SEQ) - dense(x, SEQ)).abs().max() < 1e-12
    for name, role in roles_of(module).items():
        assert (role.lr_group, role.decay, role.muon) == ("default" if name.endswith("bias") else "monarch", False, False)
    assert "second factor reads hidden units of all blocks" in why_not_divided(module.get_submodule("up"), 2)
    assert not any(why_not_divided(m, 2) for m in dense.modules())


def test_its_learning_rate_is_configured() -> None:
    folder = Path(__file__).resolve().parents[2] / "train_configs/architectures"
    config = load_config(folder / "monarch.toml", [], RunConfig).config
    with torch.device("meta"):
        assert isinstance(config.model, DecoderConfig)
        model = Decoder(config.model.model_copy(update={"n_layers": 1}), 64, 16)
    named, roles = list(model.to_empty(device="cpu").named_parameters()), roles_of(model)
    build_optimizers(config.optimizer, named, roles)
    without = config.optimizer.model_copy(update={"lr_multipliers": {}})
    with pytest.raises(ConfigError, match=r"add monarch = 1\.0"):
        build_optimizers(without, named, roles)


def test_wrong_sizes_and_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="24 inputs and 32 outputs do not make 4 blocks"):
        layer(24, 32, 4)
    with pytest.raises(ValidationError, match="unknown linear layer 'monarhc'; did you mean 'monarch'"):
        CHANNELS.resolve({"kind": "mlp", "linear": "monarhc"})
    with pytest.raises(ValidationError, match="n_blocks"):
        LINEARS.resolve({"kind": "monarch", "n_blocks": 1})
