"""Carry, Aux, roles and name-keyed initial weights."""

import pytest
import torch
from torch import nn

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.roles import Kind, roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.decoder import Decoder, DecoderConfig


def test_a_carry_is_not_changed_but_replaced() -> None:
    empty = Carry.empty()
    first = empty.with_value("v", torch.ones(2))
    assert empty.values == {}
    assert torch.equal(first.values["v"], torch.ones(2))


def test_aux_adds_up_over_blocks() -> None:
    carry = Carry.empty().with_aux("balance", torch.tensor(3.0), 2, 0.1).with_aux("balance", torch.tensor(5.0), 6, 0.1)
    aux = carry.aux["balance"]
    assert (float(aux.total), float(aux.counted), aux.weight) == (8.0, 8.0, 0.1)


def test_roles_by_kind_of_parameter() -> None:
    config = DecoderConfig.model_validate(
        {
            "n_layers": 1,
            "d_model": 8,
            "n_heads": 2,
            "channel": "mlp",
            "position": {"absolute": "learned", "relative": "linear_cpb"},
            "mixers": {"attention": {"qkv_bias": True, "sinks": True}},
        }
    )
    roles = roles_of(Decoder(config, 16, 8))
    kinds = {name: role.kind for name, role in roles.items()}
    assert kinds["embedding.weight"] is Kind.EMBEDDING
    assert kinds["position.table.weight"] is Kind.EMBEDDING
    assert kinds["head.weight"] is Kind.HEAD
    assert not roles["head.weight"].muon
    for name in ("layers.0.mixer.wq.weight", "layers.0.mixer.wo.weight", "layers.0.channel.up.weight"):
        assert roles[name].muon
        assert roles[name].decay
    for name in ("layers.0.mixer.wq.bias", "layers.0.mixer.head.sinks_H", "layers.0.norms.mixer_norm.weight", "final_norm.weight"):
        assert kinds[name] is Kind.VECTOR
        assert not roles[name].decay
    assert not any(role.muon for name, role in roles.items() if ".position." in name)


@pytest.mark.parametrize(("scheme", "expected"), [("gpt2", 0.02 / 8**0.5), ("depth_scaled", 0.02 / 4**0.5)])
def test_residual_outputs_are_scaled_by_depth(scheme: str, expected: float) -> None:
    linear = nn.Linear(256, 256)
    init = Init(InitConfig.model_validate({"scheme": scheme}), names={linear: "layers.1.wo"}, seed=0, n_layers=4)
    init.residual_output(linear, layer=1)
    assert float(linear.weight.detach().std()) == pytest.approx(expected, rel=0.02)
    assert torch.equal(linear.bias, torch.zeros(256))


def test_pytorch_scheme_draws_as_nn_linear_does() -> None:
    linear = nn.Linear(64, 512)
    init = Init(InitConfig(scheme="pytorch"), names=qualified_names(linear), seed=0, n_layers=1)
    init.linear(linear)
    for parameter in linear.parameters():
        assert float(parameter.detach().abs().max()) <= 1 / 8
        assert float(parameter.detach().std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_previous_stops_at_document_starts() -> None:
    seq = SequenceInfo.of_lengths([(3, 2, 1)])
    assert seq.position_BT.tolist() == [[0, 1, 2, 0, 1, 0]]
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    assert seq.previous(x, 1).flatten().tolist() == [0, 1, 2, 0, 4, 0]
    assert seq.previous(x, 2).flatten().tolist() == [0, 0, 1, 0, 0, 0]
    assert torch.equal(seq.previous(x, 0), x)
    assert seq.previous(x, 9).flatten().tolist() == [0] * 6
