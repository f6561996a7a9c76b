"""H-Net: cost, roles, initial weights, and what is refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.models.hnet_oracle import ATTENTION, BASE, ONE_STAGE, TWO_STAGES, VARIANTS, T, V, hnet, tokens
from titanarch.config.errors import ConfigError
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.hnet.config import HNetConfig
from titanarch.models.hnet.model import HNet
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.mesh import Degrees


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_counts_every_parameter(name: str) -> None:
    model = hnet(VARIANTS[name])
    assert HNet.cost(model.config, V, T).parameters == sum(p.numel() for p in model.parameters())


def test_flops_inside_count_once_a_chunk() -> None:
    """2 x the matrices that a token passes and its visible keys; those inside / ratio."""
    model = hnet({**ONE_STAGE, "position": {}})
    D, F_, ratio = 16, 24, 3.0
    block = 2 * (4 * D * D + 2 * D * F_)
    keys = lambda n: 4 * D * (n + 1) / 2  # noqa: E731
    expected = 2 * V * D + 2 * (block + keys(T)) + 2 * 3 * D * D + (block + keys(round(T / ratio))) / ratio
    assert HNet.cost(model.config, V, T).forward_flops_per_token == pytest.approx(expected, rel=1e-12)


def test_learning_rate_groups_and_decay() -> None:
    roles = roles_of(hnet({**TWO_STAGES, "lr_groups": True}))
    groups = {name.split(".layers")[0]: role.lr_group for name, role in roles.items()}
    assert groups["stages.0.encoder"] == groups["stages.0.router.wq.weight"] == groups["stages.0.pad_P"] == "stage_0"
    assert groups["stages.1.decoder"] == groups["stages.1.residual.linear.bias"] == "stage_1"
    assert groups["main"] == "main"
    assert groups["embedding.weight"] == groups["head.weight"] == "default"
    router, pad = roles["stages.0.router.wk.weight"], roles["stages.0.pad_P"]
    assert (router.decay, router.muon, pad.decay, pad.muon) == (True, False, False, False)
    assert {role.lr_group for role in roles_of(hnet(TWO_STAGES)).values()} == {"default"}


def test_initial_weights() -> None:
    """Router the identity, residual and pad 0; residual outputs by the blocks on their stream: 2 outside, 4 with the main stack's 2."""
    main = {**ATTENTION, "n_layers": 2, "d_model": 96}
    config = HNetConfig.model_validate({**BASE, **ONE_STAGE, "d_model": 64, "main": main})
    model = HNet(config, 200, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=0, n_layers=4))
    (stage,) = model.bare_stages()
    assert torch.equal(stage.router.wq.weight, torch.eye(64))
    assert torch.equal(stage.router.wk.weight, torch.eye(64))
    assert not any(p.any() for p in (*stage.residual.parameters(), stage.pad_P))
    outer, inner = (stack.bare_blocks[0].mixer.get_parameter("wo.weight") for stack in (stage.encoder, model.main))
    assert outer.std().item() == pytest.approx(0.3 / 2, rel=0.05)
    assert inner.std().item() == pytest.approx(0.3 / 8**0.5, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"main": {"layers": ["attention"], "d_model": 8}}, "width 8 inside 16: widths may only grow inward"),
        ({"main": {"layers": ["attention"], "d_model": 17}}, "d_model .17. is not a multiple of n_heads"),
        ({"stages": []}, "at least 1 item"),
        ({"stages": [{"encoder": ATTENTION, "decoder": ATTENTION, "d_model": 16}]}, "give model.d_model instead"),
        ({"stages": [{"encoder": ATTENTION, "decoder": ATTENTION, "capacity": 1.5}]}, "less than or equal to 1"),
        ({"stages": [{"encoder": ATTENTION, "decoder": ATTENTION, "ratio": 1.0}]}, "greater than 1"),
        ({"main": {"layers": ["no_such_mixer"]}}, "unknown mixer 'no_such_mixer'"),
        (
            {"main": {"layers": ["gla", "attention"]}, "mixers": {"attention": {"value_residual": "half"}}},
            "attention: value_residual .* mixes in the values of block 0",
        ),
    ],
)
def test_impossible_tables(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HNetConfig.model_validate({**BASE, **ONE_STAGE, **table})


def test_experts_inside_a_stage_would_count_empty_slots() -> None:
    moe = {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 8}
    with pytest.raises(ConfigError, match="use another channel there"):
        hnet({**ONE_STAGE, "channel": moe})
    (stage,), plain = ONE_STAGE["stages"], {"kind": "mlp", "d_ff": 24}
    outside = hnet({**ONE_STAGE, "channel": plain, "stages": [{**stage, "channel": moe}]})
    assert "moe_imbalance" in outside(tokens(), SequenceInfo.whole(1, T), tokens()).aux


@pytest.mark.parametrize(
    ("parallelism", "degrees", "message"),
    [
        ({"context_parallel_degree": 2}, Degrees(1, 1, 2, 1), "HNet cannot be divided: where its chunks begin depends on the data"),
        (
            {"tensor_parallel_degree": 2},
            Degrees(1, 1, 1, 2),
            "HNet cannot be divided: its stages have different.*use false",
        ),
    ],
)
def test_divisions_of_the_sequence_are_refused(parallelism: dict[str, Any], degrees: Degrees, message: str) -> None:
    config = ParallelismConfig.model_validate(parallelism)
    with torch.device("meta"):
        model = HNet(HNetConfig.model_validate({**BASE, **ONE_STAGE}), V, T)
    with pytest.raises(ConfigError, match=message):
        decide_division(model, config, degrees, seq_len=T, device_type="cpu")


def test_tensor_parallelism_without_divided_sequences_is_allowed() -> None:
    config = ParallelismConfig.model_validate({"tensor_parallel_degree": 2, "enable_sequence_parallel": False})
    with torch.device("meta"):
        model = HNet(HNetConfig.model_validate({**BASE, **ONE_STAGE}), V, T)
    assert decide_division(model, config, Degrees(1, 1, 1, 2), seq_len=T, device_type="cpu").head_tail is False
