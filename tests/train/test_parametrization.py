"""muP: factors by the paper's table, nothing changes at the base width, and activations move as much at every width."""

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import titanarch.models.components  # noqa: F401 (registers all)
from tests.train.runs import environment, run_forks, write_config
from titanarch.config.errors import ConfigError
from titanarch.contract.growth import Growth
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.model import MODELS, Model
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.width import maximal_update
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.models.mixers.attention import Attention
from titanarch.train.coordinate_check import at_width
from titanarch.train.optimizers import AdamWConfig, MuonConfig, build_optimizers
from titanarch.train.parametrization import base_config

TABLE: dict[str, Any] = {
    "name": "decoder",
    "n_layers": 1,
    "d_model": 96,
    "n_heads": 6,
    "vocab_size": 50,
    "channel": {"kind": "mlp", "activation": "gelu"},
    "mixers": {"attention": {"n_kv_heads": 3, "value_residual": "learned", "qk_norm": True}},
    "position": {"relative": "linear_cpb"},
}


def meta(table: dict[str, Any]) -> Model:
    config = MODELS.resolve(table)
    with torch.device("meta"):
        return MODELS.of(config)(config, 50, 16)


def grown(changes: dict[str, Any], table: dict[str, Any] = TABLE) -> tuple[Model, dict[str, Growth]]:
    config = MODELS.resolve(table)
    with torch.device("meta"):
        model, base = (MODELS.of(c)(c, 50, 16) for c in (config, base_config(config, changes)))
    return model, maximal_update(model, base)


def test_factors_are_those_of_the_papers_table() -> None:
    model, growth = grown({"d_model": 32, "n_heads": 2, "mixers": {"attention": {"n_kv_heads": 1}}})
    hidden = {
        "layers.0.mixer.wq",
        "layers.0.mixer.wk",
        "layers.0.mixer.wv",
        "layers.0.mixer.wo",
        "layers.0.channel.up",
        "layers.0.channel.down",
    }
    for name in hidden:
        assert growth[f"{name}.weight"] == Growth(3.0), name
        assert growth[f"{name}.weight"].lr_factor == pytest.approx(1 / 3)
        assert growth[f"{name}.weight"].std_factor == pytest.approx(1 / math.sqrt(3))
    kept = {name for name, its in growth.items() if its == Growth()}
    assert kept == growth.keys() - {f"{name}.weight" for name in hidden}
    assert model.output_multiplier == pytest.approx(1 / 3)


def test_a_weight_that_writes_no_growing_width_starts_and_learns_by_the_whole_ratio() -> None:
    two_blocks = {**TABLE, "n_layers": 2}
    _, growth = grown({"d_model": 48, "n_heads": 3, "mixers": {"attention": {"n_kv_heads": 3}}}, two_blocks)
    gate = growth["layers.1.mixer.wl.weight"]  # [n_kv_heads, d_model]: as many heads in both
    assert gate == Growth(2.0, is_output=True)
    assert (gate.lr_factor, gate.std_factor) == (0.5, 0.5)


def test_scale_of_attention_falls_by_the_head_size() -> None:
    model, _ = grown({"d_model": 24}, {**TABLE, "mixers": {"attention": {}}})
    mixer = model.get_submodule("layers.0.mixer")
    assert isinstance(mixer, Attention)
    assert mixer.head_dim == 16
    assert mixer.config.scale == pytest.approx(math.sqrt(4) / 16)  # 1/sqrt(K) at the base's 4 channels, 1/K beyond


def test_low_rank_maps_of_rwkv7_learn_as_matrices_whatever_their_ranks() -> None:
    """The first factor reads the width, also where both models have the same ranks."""
    ranks = dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 32)
    _, growth = grown({"d_model": 24, "n_heads": 2}, {**TABLE, "n_layers": 2, "layers": ["rwkv7"], "mixers": {"rwkv7": ranks}})
    for name in ("w", "a", "v", "g"):
        assert growth[f"layers.1.mixer.{name}1.weight"].lr_factor == pytest.approx(1 / 4), name
        assert growth[f"layers.1.mixer.{name}2.weight"] == Growth(), name
    assert growth["layers.1.mixer.v2.bias"] == Growth()


def test_factors_that_a_model_takes_from_its_width_stay_those_of_the_base() -> None:
    scaled, _ = grown({"d_model": 24, "n_heads": 2}, {**TABLE, "mixers": {"attention": {}}, "scale_embedding": True})
    assert scaled.embedding_scale == pytest.approx(math.sqrt(24))
    t5 = {"name": "encoder_decoder", "n_encoder_layers": 1, "n_decoder_layers": 1, "tied_head": True, "scale_head": True}
    sizes = {"d_model": 96, "n_heads": 6, "channel": "swiglu", "spans": {"n_sentinels": 4}}
    restoring, _ = grown({"d_model": 24, "n_heads": 2}, {**t5, **sizes})
    assert (restoring.head_scale, restoring.output_multiplier) == (pytest.approx(24**-0.5), pytest.approx(1 / 4))


def test_an_energy_is_divided_as_logits_are() -> None:
    """What the steps do with u is linear in the energy, so a quarter of the multiplier is a quarter of the step size."""
    table = {"name": "ebt", "n_layers": 1, "d_model": 16, "n_heads": 2, "channel": {"kind": "mlp", "d_ff": 24}, "learn_step_size": False}
    tokens, seq, logits = torch.arange(8)[None], SequenceInfo.whole(1, 8), []
    for multiplier, step_size in ((0.25, 2.0), (1.0, 0.5)):
        config = MODELS.resolve({**table, "step_size": step_size})
        model = MODELS.of(config)(config, 50, 16)
        model.reset_parameters(Init(config.init, names=qualified_names(model), seed=3, n_layers=1))
        model.output_multiplier = multiplier
        with torch.no_grad():
            logits.append(model.logits(tokens, seq))
    torch.testing.assert_close(*logits)
    wide, _ = grown({"d_model": 8, "n_heads": 1}, table)
    assert wide.output_multiplier == 0.5


@pytest.mark.parametrize("table", [{"name": "ebt", "n_layers": 1}, {"name": "decoder", "n_layers": 1}])
def test_the_base_has_its_heads_in_its_mixers_too(table: dict[str, Any]) -> None:
    config = MODELS.resolve({**table, "d_model": 96, "n_heads": 6, "channel": "swiglu"})
    base = base_config(config, {"d_model": 32, "n_heads": 2})
    assert (base.mixer if table["name"] == "ebt" else base.mixers["attention"]).n_heads == 2  # type: ignore[attr-defined]


def test_a_model_at_another_width_grows_in_all_its_parts() -> None:
    stack = {"layers": ["attention"]}
    stages = [
        {"encoder": stack, "decoder": stack},
        {"encoder": stack, "decoder": stack, "d_model": 48, "channel": {"kind": "mlp", "d_ff": 64}},
    ]
    table = {"name": "hnet", "d_model": 32, "n_heads": 4, "stages": stages, "main": {**stack, "d_model": 64}, "channel": "swiglu"}
    wide = at_width(MODELS.resolve({**table, "mixers": {"attention": {"n_heads": 2, "n_kv_heads": 1}}}), 96).model_dump()
    assert [wide["d_model"], wide["stages"][1]["d_model"], wide["main"]["d_model"]] == [96, 144, 192]
    assert wide["stages"][1]["channel"]["d_ff"] == 192
    assert (wide["mixers"]["attention"]["n_heads"], wide["mixers"]["attention"]["n_kv_heads"]) == (6, 3)
    several = {**TABLE, "channel_layers": ["experts"], "channels": {"experts": {"kind": "moe", "d_ff": 8}}}
    assert at_width(MODELS.resolve(several), 192).model_dump()["channels"]["experts"]["d_ff"] == 16
    with pytest.raises(ConfigError, match=r"width 48 would have 3 x 48 / 96 as its model.mixers.attention.n_kv_heads, no whole number"):
        at_width(MODELS.resolve(TABLE), 48)


def weights(growth: dict[str, Growth] | None, scheme: str) -> dict[str, torch.Tensor]:
    config = DecoderConfig.model_validate({k: v for k, v in TABLE.items() if k != "name"})
    model = Decoder(config, 50, 16)
    init = InitConfig.model_validate({"scheme": scheme})
    model.reset_parameters(Init(init, names=qualified_names(model), seed=3, n_layers=1, growth=growth))
    return dict(model.named_parameters())


@pytest.mark.parametrize("scheme", ["gpt2", "pytorch", "depth_scaled"])
def test_initial_weights_shrink_with_the_width(scheme: str) -> None:
    _, growth = grown({"d_model": 24, "n_heads": 6})
    mup, standard = weights(growth, scheme), weights(None, scheme)
    for name, parameter in mup.items():
        # U(+-1/sqrt(fan_in)) shrinks by itself; a fixed standard deviation does not.
        factor = 1.0 if scheme == "pytorch" else growth[name].std_factor
        torch.testing.assert_close(parameter, standard[name] * factor, msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_changes_at_the_base_width() -> None:
    model, growth = grown({"d_model": 96})
    assert set(growth.values()) == {Growth()}
    assert model.output_multiplier == 1
    mixer = model.get_submodule("layers.0.mixer")
    assert isinstance(mixer, Attention)
    assert mixer.config.scale is None


def test_learning_rates_follow_growth() -> None:
    model, growth = grown({"d_model": 24, "n_heads": 6})
    parameters = dict(model.named_parameters())
    config = AdamWConfig(lr=0.5, parametrization="mup", mup_base={"d_model": 24})
    optimizers = build_optimizers(config, parameters.items(), roles_of(model), growth)
    rates = {id(p): group["lr"] for o in optimizers.torch_optimizers for group in o.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in parameters.items()} == {name: 0.5 * growth[name].lr_factor for name in parameters}
    optimizers.set_lr(0.1)
    assert optimizers.torch_optimizers[0].param_groups[0]["lr"] in (pytest.approx(0.05), pytest.approx(0.0125))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "made of other parts: layers.1"),
        ({"d_model": 25}, "not a multiple of n_heads"),
        ({"d_modle": 24}, "d_modle"),
        ({"norm": "layernorm"}, "made of other parts"),
    ],
)
def test_a_base_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grown(changes)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AdamWConfig, {"parametrization": "mup"}, "needs mup_base"),
        (AdamWConfig, {"mup_base": {"d_model": 8}}, "does nothing without"),
        (MuonConfig, {"adamw_lr": 0.1, "parametrization": "mup", "mup_base": {"d_model": 8}}, "Adam and AdamW"),
    ],
)
def test_options_that_do_not_fit_are_refused(config: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(lr=0.1, **options)


def coordcheck(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Of a small decoder, 64 to 256 wide."""
    arguments = ["coordcheck", "--config", str(config), "--steps", "4", "--widths", "64", "256", *overrides]
    return run_forks([(arguments, environment())])[0]


def test_activations_move_as_much_at_every_width(tmp_path: Path) -> None:
    """With one learning rate; under the standard parametrization they move the more the wider the model is."""
    config = write_config(tmp_path, "coordinates", tmp_path / "cache")
    plain = ("--optimizer.lr=1e-2", "--model.dropout=0.0", "--model.mixers.attention.dropout=0.0")
    standard = coordcheck(config, *plain)
    assert standard.returncode == 1, standard.stdout + standard.stderr
    assert "move the more the wider the model is" in standard.stdout
    mup = coordcheck(config, *plain, "--optimizer.parametrization=mup", "--optimizer.mup_base={d_model=64, n_heads=4}")
    assert mup.returncode == 0, mup.stdout + mup.stderr
    exponents = {line.split()[0]: float(line.split()[-1]) for line in mup.stdout.splitlines()[1:-1]}
    assert {"layers.0.mixer", "layers.1.channel", "logits"} <= exponents.keys()
    refused = coordcheck(config, "--optimizer.parametrization=mup", "--optimizer.mup_base={n_layers=1}")
    assert (refused.returncode, "made of other parts" in refused.stderr) == (2, True)
