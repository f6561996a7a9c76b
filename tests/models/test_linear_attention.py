"""GLA and RetNet as whole mixers against their equations written apart, and what their backends and sizes refuse."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.config.errors import ConfigError
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.mixer import MIXERS, SequenceMixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.models.decoder_config import DecoderConfig
from titanarch.ops import recurrence_backend
from titanarch.ops._decay_kernels import FORGET
from titanarch.ops.decay_recurrence import decay_recurrence, decay_recurrence_naive

D, H, T = 24, 3, 50
SHAPE = ModelShape(d_model=D, vocab_size=32, seq_len=T, layers=("mixer",))


def built(kind: str, **options: Any) -> SequenceMixer:
    mixer = MIXERS[kind](MIXERS[kind].Config.model_validate({"n_heads": H, **options}), SHAPE, 0)
    assert isinstance(mixer, SequenceMixer)
    mixer.reset_parameters(Init(InitConfig(std=0.3), names=qualified_names(mixer), seed=1, n_layers=1))
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return mixer.double()


def gla(m: nn.Module, x_TD: Tensor) -> Tensor:
    """One document: the state is written and read token by token, head by head (equations 3 to 5 of the paper)."""
    K, V = D // 2 // H, D // H
    q, k, v = (linear(x_TD) for linear in (m.wq, m.wk, m.wv))
    alpha = torch.sigmoid(x_TD @ m.gate_down.weight.T @ m.gate_up.weight.T + m.gate_up.bias) ** (1 / 16)
    rows = []
    for h in range(H):
        S, outputs = torch.zeros(K, V, dtype=x_TD.dtype), []
        for t in range(len(x_TD)):
            key, value = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
            S = alpha[t, key, None] * S + torch.outer(k[t, key], v[t, value])
            outputs.append(q[t, key] @ S / K**0.5)
        y = torch.stack(outputs)
        rows.append(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.gain_V)
    gate = m.wg(x_TD)
    return (torch.cat(rows, -1) * gate * torch.sigmoid(gate)) @ m.wo.weight.T


def retnet(m: nn.Module, x_TD: Tensor) -> Tensor:
    """One document in the parallel form: (Q K^T * D) V with D[t, s] = gamma^(t - s), and complex numbers for the rotation."""
    n, K, V = len(x_TD), D // H, 2 * D // H
    q, k, v = (linear(x_TD).unflatten(-1, (H, -1)).transpose(0, 1) for linear in (m.wq, m.wk, m.wv))
    frequency = torch.tensor([10_000 ** -(i / (K // 2 - 1)) for i in range(K // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(n, K // 2, dtype=torch.float64), torch.arange(n)[:, None] * frequency)
    q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2) for z in (q, k))
    gamma = torch.tensor([1 - 2 ** (-5 - h) for h in range(H)], dtype=torch.float64)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    decay = (gamma[:, None, None] ** distance.clamp(min=0)) * (distance >= 0)
    y = (q @ k.mT / K**0.5 * decay) @ v
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).transpose(0, 1).reshape(n, H * V)
    return (y * F.silu(m.wg(x_TD))) @ m.wo.weight.T


@pytest.mark.parametrize(("kind", "formula"), [("gla", gla), ("retnet", retnet)])
def test_packed_outputs_and_gradients_are_the_equations(kind: str, formula: Callable[[nn.Module, Tensor], Tensor]) -> None:
    mixer, lengths = built(kind, chunk_size=16), (9, 1, 40)
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(1, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    packed = SequenceInfo.of_lengths([lengths])
    y, _ = mixer(x, packed, Carry.empty())
    expected = torch.cat([formula(mixer, part) for part in x[0].split(lengths)])[None]
    leaves = [x, *mixer.parameters()]
    results = [(out, *torch.autograd.grad((out * weights).sum(), leaves)) for out in (y, expected)]
    for found, wanted in zip(*results, strict=True):
        # The fixed decays of retention are fp32 numbers.
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_heads_of_the_model_are_taken_where_a_table_needs_them() -> None:
    table = {"n_layers": 3, "d_model": 32, "n_heads": 4, "layers": ["gla", "retnet", "mamba2"], "channel": "none"}
    mixers = DecoderConfig.model_validate(table).mixers
    assert (mixers["gla"].n_heads, mixers["retnet"].n_heads, mixers["mamba2"].n_heads) == (4, 4, None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gla", {"n_heads": 5}, "expand_k .0.5. x d_model .24. / n_heads .5. is 2.4 channels a head"),
        ("retnet", {"expand_v": 0.3}, "is 2.4 channels a head"),
        ("retnet", {"n_heads": 8}, "3 key channels a head turn in pairs"),
    ],
)
def test_impossible_sizes_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(kind, **options)


@pytest.mark.parametrize("kind", ["gla", "retnet", "mamba2"])
def test_a_kernel_asked_for_by_name_is_refused_where_it_cannot_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"n_heads": 6} if kind == "mamba2" else {}
    mixer = built(kind, backend="fla", **options)
    assert "is for CUDA, and this is cpu" in mixer.why_not_on("cpu", compiled=False)
    assert "cannot be part of a compiled graph" in mixer.why_not_on("cuda", compiled=True)
    monkeypatch.setattr(recurrence_backend, "import_failure", lambda package: f"No module named '{package}'")
    assert "pip install flash-linear-attention" in mixer.why_not_on("cuda", compiled=False)
    monkeypatch.setattr(recurrence_backend, "import_failure", lambda package: "")
    assert mixer.why_not_on("cuda", compiled=False) == ""
    assert built(kind, **options).why_not_on("cpu", compiled=True) == ""


@pytest.mark.parametrize("vector", [False, True])
def test_flash_linear_attention_is_called_for_the_same_recurrence(*, vector: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced by the definition with its signature: documents are kept apart by log decays alone."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, initial_state: Tensor, output_final_state: bool) -> Any:
        assert output_final_state
        assert g.shape == (k.shape if vector else k.shape[:3])
        return decay_recurrence_naive(scale * q, k, v, g, starts_BT=None, state=initial_state)

    modules = {"fla.ops.simple_gla": "chunk_simple_gla", "fla.ops.gla": "chunk_gla"}
    for name, function in modules.items():
        module = ModuleType(name)
        setattr(module, function, kernel)
        monkeypatch.setitem(sys.modules, name, module)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, T, H if vector else 1, 4, generator=generator) for _ in range(2))
    v, state = torch.randn(2, T, H, 5, generator=generator), torch.randn(2, H, 4, 5, generator=generator)
    log_decay = -torch.rand(2, T, H, *((4,) if vector else ()), generator=generator)
    starts = torch.rand(2, T, generator=generator) < 0.1
    assert torch.exp(torch.tensor(FORGET)) == 0
    found = decay_recurrence(q, k, v, log_decay, starts_BT=starts, state=state, backend="fla")
    expected = decay_recurrence(q, k, v, log_decay, starts_BT=starts, state=state)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
