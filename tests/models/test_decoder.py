"""The decoder: exact costs, causality, packing, decoding, and published models by other hands."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.config.errors import ConfigError
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.decoder import Decoder, DecoderConfig

V, T = 61, 24
BASE: dict[str, Any] = {"n_layers": 3, "d_model": 32, "n_heads": 4, "channel": {"kind": "mlp", "d_ff": 48}}

VARIANTS: dict[str, dict[str, Any]] = {
    "nope": {},
    "sinusoidal": {"position": {"absolute": "sinusoidal"}},
    "scaled_sinusoidal": {"position": {"absolute": "scaled_sinusoidal"}},
    "learned": {"position": {"absolute": {"kind": "learned", "max_length": 64}}},
    "ape_sum_over_average": {"position": {"absolute": "ape_sum_over_average"}},
    "ape_unit_variance": {"position": {"absolute": "ape_unit_variance"}},
    "alibi": {"position": {"relative": "alibi"}},
    "linear_cpb": {"position": {"relative": "linear_cpb"}},
    "linear_cpb_large": {"position": {"relative": "linear_cpb_large"}},
    "log_cpb": {"position": {"relative": "log_cpb"}},
    "fourier_cpb": {"position": {"relative": "fourier_cpb"}},
    "t5": {"position": {"relative": "t5"}},
    "rotary": {"position": {"relative": "rotary"}},
    "rotary_partial_interleaved": {"position": {"relative": {"kind": "rotary", "fraction": 0.5, "layout": "interleaved"}}},
    "rotary_and_alibi": {"position": {"relative": ["rotary", "alibi"]}},
    "nope_every_third": {
        "layers": ["attention", "attention", "nope"],
        "position": {"relative": "rotary"},
        "mixers": {"nope": {"kind": "attention", "position": []}},
    },
    "gqa_window_cap_sinks": {"mixers": {"attention": {"n_kv_heads": 2, "window": 7, "soft_cap": 9.0, "sinks": True}}},
    "mqa_gate_qk_norm": {"mixers": {"attention": {"n_kv_heads": 1, "output_gate": True, "qk_norm": True, "head_dim": 6}}},
    "biases": {"mixers": {"attention": {"qkv_bias": True, "out_bias": True}}, "head_bias": True, "norm": "layernorm"},
    "value_residual": {"mixers": {"attention": {"value_residual": "learned"}}},
    "value_residual_half": {"mixers": {"attention": {"value_residual": "half"}}},
    "diff_attention": {
        "layers": ["diff_attention"],
        "position": {"relative": ["rotary", "alibi"]},
        "mixers": {"diff_attention": {"n_kv_heads": 2, "window": 9, "sinks": True, "value_residual": "half"}},
    },
    "diff_attention_v2": {
        "layers": ["diff_attention_v2"],
        "position": {"relative": ["rotary", "linear_cpb"]},
        "mixers": {"diff_attention_v2": {"n_kv_heads": 2, "output_gate": True, "value_residual": "learned"}},
    },
    "mla": {"layers": ["mla"], "position": {"relative": "rotary"}},
    "mla_q_rank_window": {
        "layers": ["mla"],
        "position": {"relative": ["rotary", "alibi"]},
        "mixers": {"mla": {"q_rank": 20, "rotary_dim": 6, "value_dim": 10, "window": 7, "sinks": True, "output_gate": True}},
    },
    "post_norm_relu2": {"residual": "post_norm", "norm": "layernorm", "channel": {"kind": "mlp", "activation": "relu2"}},
    "sandwich_swiglu": {"residual": "sandwich", "channel": "swiglu"},
    "parallel_geglu": {"residual": "parallel", "channel": "geglu"},
    "no_mixer_residual_reglu": {"residual": "no_mixer_residual", "channel": "reglu"},
    "no_channel": {"channel": "none"},
    "bilinear_no_norm": {"channel": "bilinear", "norm": "none", "init": {"scheme": "depth_scaled"}},
    "mixed_activation": {"channel": {"kind": "mlp", "d_ff": 48, "activation": {"kind": "mixed", "activations": ["relu", "silu", "gelu"]}}},
    "tied_biased_scaled_capped": {"tied_head": True, "head_bias": True, "scale_embedding": True, "head_soft_cap": 8.0},
    "pytorch_init": {"init": {"scheme": "pytorch"}},
}


def decoder(table: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Decoder:
    config = DecoderConfig.model_validate({**BASE, **table})
    model = Decoder(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=seed, n_layers=config.n_layers))
    return model.to(dtype)


def tokens(n_rows: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(V, (n_rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_counts_every_parameter(name: str) -> None:
    model = decoder(VARIANTS[name])
    cost = Decoder.cost(model.config, V, T)
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("flavor", "parameters"),
    [("llama3_1b", 1_235_814_400), ("llama3_3b", 3_212_749_824), ("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496)],
)
def test_published_parameter_counts(flavor: str, parameters: int) -> None:
    config = DecoderConfig.model_validate({"flavor": flavor})
    assert Decoder.cost(config, 128_256, 8192).parameters == parameters


@pytest.mark.parametrize(("flavor", "millions"), [("xsmall", 3.1), ("small", 10.6), ("medium", 25.2), ("large", 85.0), ("xlarge", 201.4)])
def test_the_position_studys_sizes(flavor: str, millions: float) -> None:
    config = DecoderConfig.model_validate({"flavor": flavor})
    assert Decoder.cost(config, 8192, 128).non_embedding_parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_a_later_one(name: str) -> None:
    model, x, j = decoder(VARIANTS[name]), tokens(), 11
    changed = x.clone()
    changed[:, j] = (changed[:, j] + 1) % V
    seq = SequenceInfo.whole(2, T)
    with torch.no_grad():
        before, after = model.logits(x, seq), model.logits(changed, seq)
    assert torch.equal(before[:, :j], after[:, :j])
    assert not torch.allclose(before[:, j:], after[:, j:])


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    model, x = decoder(VARIANTS[name]), tokens(1)
    lengths = (9, 1, 14)
    packed = SequenceInfo.of_lengths([lengths])
    with torch.no_grad():
        together = model.logits(x, packed)
        apart = [model.logits(part, SequenceInfo.whole(1, part.shape[1])) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_by_step_equals_the_whole_forward(name: str) -> None:
    model, x = decoder(VARIANTS[name]), tokens(2, 10)
    with torch.no_grad():
        whole = model.logits(x, SequenceInfo.whole(2, 10))
        states = model.initial_state(2)
        for index in range(10):
            logits, states = model.step(x[:, index : index + 1], index, states)
            torch.testing.assert_close(logits, whole[:, index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_longer_sequences_than_trained_on_evaluate(name: str) -> None:
    model, x = decoder(VARIANTS[name]), tokens(1, 3 * T)
    longest = model.max_length()
    if longest is None:
        with torch.no_grad():
            assert torch.isfinite(model.token_losses(x, SequenceInfo.whole(1, 3 * T), x)).all()
    else:
        with pytest.raises(ConfigError, match=f"{3 * T} tokens is longer than the position table's {longest}"):
            model.token_losses(x, SequenceInfo.whole(1, 3 * T), x)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model, x = decoder(VARIANTS[name]), tokens()
    model(x[:, :-1], SequenceInfo.whole(2, T - 1), x[:, 1:]).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    allowed = {name for name in without if "wk.bias" in name or name.endswith("W2.bias")}
    assert set(without) <= allowed, f"no gradient: {without}"


def test_losses_agree_with_logits() -> None:
    model, x = decoder(VARIANTS["tied_biased_scaled_capped"]), tokens()
    seq, labels = SequenceInfo.whole(2, T), tokens().roll(-1, 1)
    labels[0, :5] = -100
    objective = model(x, seq, labels, 1e-2)
    logits = model.logits(x, seq).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    torch.testing.assert_close(model.token_losses(x, seq, labels).double().flatten(), expected, rtol=1e-5, atol=1e-5)
    z = (logits.logsumexp(-1).square() * (labels != -100)).sum()
    torch.testing.assert_close(objective.loss_sum.double(), expected.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(objective.total.double(), expected.sum() + 1e-2 * z, rtol=1e-5, atol=1e-4)
    assert int(objective.n_targets) == 2 * T - 5


def test_start_augmentation_draws_by_row_and_only_in_training() -> None:
    table = {"position": {"absolute": {"kind": "learned", "max_length": 64}, "start_augmentation": 64}}
    model, x = decoder(table), tokens()
    plain = SequenceInfo.whole(2, T)
    drawn = replace(plain, seed=5, row_B=torch.tensor([8, 9]))
    with torch.no_grad():
        assert torch.equal(model.logits(x, plain), decoder({"position": {"absolute": table["position"]["absolute"]}}).logits(x, plain))
        both = model.logits(x, drawn)
        alone = model.logits(
            x[1:], replace(drawn, row_B=torch.tensor([9]), position_BT=plain.position_BT[1:], document_BT=plain.document_BT[1:])
        )
    assert not torch.allclose(both, model.logits(x, plain))
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"n_heads": 5}, "not a multiple of n_heads"),
        ({"mixers": {"attention": {"n_kv_heads": 3}}}, "not a multiple of n_kv_heads"),
        ({"layers": ["diff_attention"], "n_heads": 3}, r"diff_attention: d_model \(32\) is not a multiple of 2 x n_heads \(3\)"),
        ({"layers": ["diff_attention"], "mixers": {"diff_attention": {"n_kv_heads": 3}}}, "not a multiple of n_kv_heads"),
        ({"layers": ["diff_attention_v2"], "n_heads": 5}, r"diff_attention_v2: d_model \(32\) is not a multiple of n_heads"),
        ({"layers": ["mla"], "n_heads": 5}, r"mla: d_model \(32\) is not a multiple of n_heads"),
        ({"layers": ["mla"], "mixers": {"mla": {"head_dim": 5}}}, "give rotary_dim"),
        ({"flavor": "smal"}, "did you mean 'small'"),
        ({"layers": ["attentoin"]}, "did you mean 'attention'"),
        ({"layers": []}, "layers is empty"),
        ({"position": {"relative": "alibbi"}}, "did you mean 'alibi'"),
    ],
)
def test_impossible_tables_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.model_validate({**BASE, **table})


RESIDUAL = {"value_residual": "half"}
BOTH_RESIDUAL = {"attention": RESIDUAL, "local": {"kind": "attention", "window": 6, "value_residual": "learned"}}


@pytest.mark.parametrize(
    "table",
    [
        {"layers": ["mamba2", "attention"], "mixers": {"attention": RESIDUAL}},
        {"layers": ["nope", "attention"], "mixers": {"attention": RESIDUAL, "nope": {"kind": "attention"}}},
        {"layers": ["wide", "attention"], "mixers": {"attention": RESIDUAL, "wide": {"kind": "attention", "head_dim": 16, **RESIDUAL}}},
        {"layers": ["diff_attention", "attention"], "mixers": {"attention": RESIDUAL, "diff_attention": {"n_kv_heads": 2, **RESIDUAL}}},
    ],
    ids=["another mixer", "without it", "wider heads", "fewer value heads"],
)
def test_a_value_residual_needs_values_of_its_shape_from_the_first_block(table: dict[str, Any]) -> None:
    """In any order in which the first block has none; a pattern longer than the depth does not name the mixers beyond it."""
    with pytest.raises(ValueError, match=r"attention: value_residual .* mixes in the values of block 0"):
        DecoderConfig.model_validate({**BASE, **table})
    layers = table["layers"][::-1]
    if "nope" in layers or "mamba2" in layers:
        DecoderConfig.model_validate({**BASE, **table, "layers": layers})
    DecoderConfig.model_validate({**BASE, **table, "n_layers": 1})


def test_a_value_residual_may_pass_between_tables() -> None:
    model = decoder({"layers": ["attention", "local"], "mixers": BOTH_RESIDUAL, "position": {"relative": "rotary"}})
    assert model.logits(tokens(), SequenceInfo.whole(2, T)).isfinite().all()


def test_a_table_shorter_than_the_augmentation_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise max_length"):
        decoder({"position": {"absolute": {"kind": "learned", "max_length": 64}, "start_augmentation": 100}})


def test_the_same_seed_gives_the_same_weights_whatever_else_is_there() -> None:
    plain, gated = decoder({}), decoder({"mixers": {"attention": {"output_gate": True}}})
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, gated.get_parameter(name)), name
    other = decoder({}, seed=1)
    assert not torch.equal(plain.embedding.weight, other.embedding.weight)
    assert InitConfig().scheme == "gpt2"
