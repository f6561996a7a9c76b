"""Attention with a feed-forward layer on its values, against attention that is given those values; decoding, packing, sizes."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import materialized, n_parameters, shape
from titanarch.contract.mixer import MIXERS
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.decoder import Decoder
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.mixers.values_relu import ValuesReluAttention

B, T, D = 2, 9, 32
KIND = "values_relu_attention"


def build(**table: object) -> ValuesReluAttention:
    config = MIXERS.resolve({"kind": KIND, "n_heads": 4, "position": "rotary", **table})
    module = materialized(lambda: ValuesReluAttention(config, shape(D), 0)).double()
    assert ValuesReluAttention.cost(config, shape(D), 0).parameters == n_parameters(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(20)
    return module


def softmax_attention(module: ValuesReluAttention, x: Tensor, v_BTD: Tensor, document_BT: Tensor, position_BT: Tensor) -> Tensor:
    """The product of every pair of tokens, with rotation by the mixer's own scheme and everything else in plain torch."""
    H, K = 4, D // 4
    q, k = ((x @ w.weight.T).unflatten(-1, (-1, K)) for w in (module.wq, module.wk))
    for position in module.relative_positions():
        q, k = position.rotate(q, k, position_BT)
    logits = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // k.shape[2], 2)) / K**0.5
    seen = torch.ones(T, T).tril().bool() & (document_BT[:, :, None] == document_BT[:, None])
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    v = v_BTD.unflatten(-1, (-1, K))
    return torch.einsum("bhts,bshk->bthk", weights, v.repeat_interleave(H // v.shape[2], 2)).flatten(2) @ module.wo.weight.T


@pytest.mark.parametrize(
    "table", [{}, {"value_units": 20, "n_kv_heads": 2}, {"form": "first"}, {"form": "first", "n_kv_heads": 1}], ids=str
)
def test_outputs_and_gradients_are_the_formula_on_packed_rows(table: dict[str, object]) -> None:
    module = build(**table)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    seq = SequenceInfo.of_lengths([(4, 5)] * B)
    leaves = [x, *module.parameters()]
    out, _ = module.run(x, seq, Carry.empty())
    v = x @ module.value_in.weight.T
    if module.config.form == "up_down":
        v = v @ module.value_up.weight.T
    expected = softmax_attention(module, x, v.clamp(min=0) @ module.wv.weight.T, seq.document_BT, seq.position_BT)
    grads = [torch.autograd.grad((y * w).sum(), leaves) for y in (out, expected)]
    assert (out - expected).abs().max() / expected.abs().max() < 1e-6
    for found, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 0
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-6


def test_decoding_by_steps_is_the_whole_forward() -> None:
    table = {"n_layers": 2, "d_model": D, "n_heads": 4, "channel": "none", "layers": [KIND], "position": {"relative": "rotary"}}
    model = materialized(lambda: Decoder(DecoderConfig.model_validate(table), 50, 16)).double()
    tokens = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(0))
    whole, states = model.logits(tokens, SequenceInfo.whole(B, T)), model.initial_state(B)
    for index in range(T):
        logits, states = model.step(tokens[:, index : index + 1], index, states)
        assert (logits - whole[:, index]).abs().max() < 1e-9


def test_sizes_of_march_and_wrong_ones() -> None:
    assert build().value_up.weight.shape == (4 * D, D)
    assert build(value_units=D).wv.weight.shape == (D, D)
    assert build(form="first", n_kv_heads=2).wv.weight.shape == (D // 2, D // 2)
    with pytest.raises(ValidationError, match="value_units"):
        MIXERS.resolve({"kind": KIND, "n_heads": 4, "value_units": 0})
    with pytest.raises(ValidationError, match="does nothing with form = 'first'"):
        MIXERS.resolve({"kind": KIND, "n_heads": 4, "form": "first", "value_units": 20})
