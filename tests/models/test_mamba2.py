"""Mamba-2 against transformers' mixer, its initial weights against their definition, sizes and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config as TheirConfig
from transformers.models.mamba2 import modeling_mamba2

from titanarch.config.errors import ConfigError
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.mixers.mamba2 import Mamba2, Mamba2Config

D, T = 32, 40
SHAPE = ModelShape(d_model=D, vocab_size=32, seq_len=T, layers=("mamba2",))


class InFloat64:
    """torch as a module sees it, but for float32, which is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def mamba(seed: int = 1, shape: ModelShape = SHAPE, **options: Any) -> Mamba2:
    mixer = Mamba2(Mamba2Config.model_validate(options), shape, 0)
    mixer.reset_parameters(Init(InitConfig(std=0.3), names=qualified_names(mixer), seed=seed, n_layers=1))
    return mixer


def by_their_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, or their gradients, as theirs are fused."""
    named = {
        "in_proj.weight": torch.cat([ours[f"{name}.weight"] for name in ("wz", "wx", "wb", "wc", "wdt")]),
        "conv1d.weight": torch.cat([ours[f"conv_{name}.weight_CW"] for name in "xbc"])[:, None],
        "A_log": ours["head.a_log_H"],
        "dt_bias": ours["head.dt_bias_H"],
        "D": ours["head.d_H"],
        "norm.weight": ours["gain.gain_C"],
        "out_proj.weight": ours["wo.weight"],
    }
    if "conv_x.bias_C" in ours:
        named["conv1d.bias"] = torch.cat([ours[f"conv_{name}.bias_C"] for name in "xbc"])
    return named


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 8, "state_dim": 12, "n_groups": 2, "chunk_size": 16},
        {"n_heads": 4, "state_dim": 5, "chunk_size": 64, "conv_bias": False, "conv_size": 2},
    ],
)
def test_outputs_and_gradients_equal_transformers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With every parameter random, D and the norm's gain too. Theirs computes in fp32 inside, which is made fp64 here."""
    monkeypatch.setattr(modeling_mamba2, "torch", InFloat64())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    ours = mamba(**options).double()
    for parameter in ours.head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.nn.init.uniform_(ours.gain.gain_C, 0.5, 1.5)
    config = ours.config
    theirs = modeling_mamba2.Mamba2Mixer(
        TheirConfig(
            hidden_size=D,
            num_heads=config.n_heads,
            head_dim=config.head_dim,
            state_size=config.state_dim,
            n_groups=config.n_groups,
            conv_kernel=config.conv_size,
            use_conv_bias=config.conv_bias,
            chunk_size=16,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    ).double()
    theirs.load_state_dict(by_their_names({name: p.detach() for name, p in ours.named_parameters()}))
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(2, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    y, _ = ours(x, SequenceInfo.whole(2, T), Carry.empty())
    expected = theirs(x)
    assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()
    mine = dict(zip(["x", *dict(ours.named_parameters())], torch.autograd.grad((y * weights).sum(), [x, *ours.parameters()]), strict=True))
    names = ["x", *dict(theirs.named_parameters())]
    found = {"x": mine.pop("x"), **by_their_names(mine)}
    for name, grad in zip(names, torch.autograd.grad((expected * weights).sum(), [x, *theirs.parameters()]), strict=True):
        assert (found[name] - grad).abs().max() <= 1e-10 * grad.abs().max(), name


def test_initial_weights_are_those_of_the_paper() -> None:
    """A is uniform in [1, 16] and time steps log-uniform in [1e-3, 0.1]: means and extremes over 4,096 heads."""
    shape = ModelShape(d_model=4096, vocab_size=32, seq_len=T, layers=("mamba2",))
    with torch.device("meta"):
        mixer = Mamba2(Mamba2Config.model_validate({"head_dim": 2, "state_dim": 1}), shape, 0)
    names = qualified_names(mixer)
    mixer.head.to_empty(device="cpu")
    init = Init(InitConfig(), names=names, seed=0, n_layers=1)
    filled = {}
    init.fill = lambda module, name, draw: filled.update({name: draw((4096,), torch.Generator().manual_seed(0))})  # type: ignore[method-assign]
    mixer.reset_parameters(init)
    a, log_dt = filled["a_log_H"].exp(), torch.nn.functional.softplus(filled["dt_bias_H"]).log()
    assert a.mean() == pytest.approx(8.5, abs=5 * (15 / math.sqrt(12)) / 64)
    assert (a.min().item(), a.max().item()) == pytest.approx((1, 16), abs=0.05)
    span = math.log(0.1 / 1e-3)
    assert log_dt.mean() == pytest.approx(math.log(1e-2), abs=5 * (span / math.sqrt(12)) / 64)
    assert (log_dt.min().item(), log_dt.max().item()) == pytest.approx((math.log(1e-3), math.log(0.1)), abs=0.02)
    assert torch.equal(filled["d_H"], torch.ones(4096))


def test_cost_of_the_published_size() -> None:
    """6,600,032 parameters at d_model 1024 with the defaults; no weight decay on A_log, dt_bias and D, which stay fp32."""
    shape = ModelShape(d_model=1024, vocab_size=32, seq_len=T, layers=("mamba2",))
    config = Mamba2Config.model_validate({})
    assert Mamba2.cost(config, shape, 0).parameters == 6_600_032
    with torch.device("meta"):
        mixer = Mamba2(config, shape, 0)
    assert sum(p.numel() for p in mixer.parameters()) == 6_600_032
    assert (mixer.config.n_heads, mixer.config.head_dim) == (32, 64)
    roles = roles_of(mixer)
    decayed = {name for name, role in roles.items() if role.decay}
    assert decayed == {name for name in roles if name.endswith(("weight", "weight_CW"))}
    assert "head" in Mamba2.fp32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 24}, "do not make the inner width 64"),
        ({"n_heads": 4, "head_dim": 8}, "do not make the inner width 64"),
        ({"n_groups": 3}, "n_groups .3. does not divide its 4 heads"),
        ({"expand": 1.3}, "is 41.6 channels"),
        ({"dt_min": 0.5}, "dt_min"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mamba(**options)
