"""Every file in train_configs/: its model builds, costs what it has, and the numbers that its comments promise are true."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from titanarch.config.identity import identity_table
from titanarch.config.load import load_config
from titanarch.contract.channel import CHANNELS
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.linear import LINEARS
from titanarch.contract.mixer import MIXERS
from titanarch.contract.model import MODELS, Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.tokenizers import build_tokenizer
from titanarch.models.channels.hidden import HiddenChannel
from titanarch.models.mixers.attention import Attention
from titanarch.models.norms import LayerNorm
from titanarch.train.check import check_run, meta_model, vocabulary
from titanarch.train.run_config import RunConfig

FOLDER = Path(__file__).resolve().parents[1] / "train_configs"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.toml"))
POSITION = "studies/position"
COURSE = "studies/course_lab"


@cache
def loaded(name: str) -> RunConfig:
    return load_config(FOLDER / name, [], RunConfig).config


@cache
def vocab_size(name: str) -> int:
    return vocabulary(loaded(name), tokenizer_size(loaded(name).data.tokenizer.kind))


@cache
def tokenizer_size(kind: str) -> int:
    """Of the package's tokenizer of that kind, which every file uses."""
    return build_tokenizer(next(c for c in map(loaded, FILES) if c.data.tokenizer.kind == kind).data.tokenizer).vocab_size


def model_of(name: str) -> Model:
    return meta_model(loaded(name), vocab_size(name))


def cost_of(name: str) -> Cost:
    config = loaded(name)
    return MODELS.of(config.model).cost(config.model, vocab_size(name), config.training.seq_len)


def differences(name: str, base: str) -> dict[str, Any]:
    """The fixed keys in which a file differs from another, with its own values; None where it lacks one."""
    mine, theirs = identity_table(loaded(name)), identity_table(loaded(base))
    return {key: mine.get(key) for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}


@pytest.mark.parametrize("name", FILES)
def test_the_model_builds_and_costs_what_it_has(name: str) -> None:
    assert cost_of(name).parameters == sum(p.numel() for p in model_of(name).parameters())


@pytest.mark.parametrize("name", FILES)
def test_it_could_start_on_as_few_processes_as_its_degrees_make(name: str) -> None:
    p = loaded(name).parallelism
    others = p.data_parallel_replicate_degree * p.context_parallel_degree * p.tensor_parallel_degree
    check_run(loaded(name), world_size=others * max(p.data_parallel_shard_degree, 1), device_type="cpu")


def test_no_two_files_share_a_folder() -> None:
    folders = [loaded(name).job.dump_folder for name in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Llama 3 8B and Llama 3.2 1B as published; GPT-3 by hand: V D + T D + L (12 D^2 + 13 D) + 2 D
        ("llama3_8b.toml", 8_030_261_248),
        ("llama3_1b.toml", 1_235_814_400),
        ("gpt_125m.toml", 50_304 * 768 + 2048 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768),
        ("gpt_350m.toml", 50_304 * 1024 + 2048 * 1024 + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024),
        ("gpt_1_3b.toml", 50_304 * 2048 + 2048 * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert cost_of(name).parameters == parameters


@pytest.mark.parametrize(
    ("name", "tokens_a_step", "warmup_tokens"),
    [
        ("gpt_125m.toml", 524_288, 375e6),
        ("gpt_350m.toml", 524_288, 375e6),
        ("gpt_1_3b.toml", 1_048_576, 375e6),
        ("llama3_1b.toml", 2_097_152, 2000 * 2_097_152),
        ("llama3_8b.toml", 4_194_304, 2000 * 4_194_304),
    ],
)
def test_budgets_of_large_models(name: str, tokens_a_step: int, warmup_tokens: float) -> None:
    config = loaded(name)
    assert config.training.seq_len * config.training.global_batch_size == tokens_a_step
    assert config.lr_scheduler.warmup_steps * tokens_a_step == pytest.approx(warmup_tokens, rel=2e-3)
    assert config.training.tokens == pytest.approx(20 * cost_of(name).parameters, rel=0.02)


POSITION_ARMS = {
    "none": {},
    "learned": {"model.position.absolute.kind": "learned", "model.position.absolute.max_length": 1024},
    "sinusoidal": {"model.position.absolute.kind": "sinusoidal", "model.position.absolute.theta": 10_000.0},
}


def test_packing_arms_differ_in_their_packing_alone() -> None:
    for packing in ("best_fit", "padded"):
        assert differences(f"studies/packing/{packing}.toml", "studies/packing/concat.toml") == {"data.packing": packing}
    training = loaded("studies/packing/concat.toml").training
    assert training.steps * training.global_batch_size / 6_682 == pytest.approx(3.8, abs=0.05)


@pytest.mark.parametrize("arm", POSITION_ARMS)
def test_absolute_arms_differ_in_their_positions_alone(arm: str) -> None:
    assert differences(f"{POSITION}/{arm}.toml", f"{POSITION}/base.toml") == POSITION_ARMS[arm]


@pytest.mark.parametrize("arm", ["alibi", "fourier_cpb", "linear_cpb", "linear_cpb_large", "log_cpb", "rotary"])
def test_relative_arms_differ_in_their_positions_alone(arm: str) -> None:
    differing = differences(f"{POSITION}/{arm}.toml", f"{POSITION}/base.toml")
    assert {key.split("[")[0] for key in differing} == {"model.position.relative", "model.mixers.attention.position"}
    (relative,) = loaded(f"{POSITION}/{arm}.toml").model.position.relative
    assert relative.kind == arm
    if arm == "rotary":
        assert relative.fraction == 0.5


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("learned_50k", "learned", {"training.steps": 50_000}),
        ("learned_augmented_50k", "learned_50k", {"model.position.start_augmentation": 1024}),
        ("linear_cpb_2048", "linear_cpb", {"training.seq_len": 2048, "training.global_batch_size": 8}),
        ("icl_128", "linear_cpb", {"training.steps": 200_000, "training.global_batch_size": 256}),
        ("icl_256", "icl_128", {"training.seq_len": 256, "training.global_batch_size": 128}),
        ("icl_512", "icl_128", {"training.seq_len": 512, "training.global_batch_size": 64}),
        ("icl_1024", "icl_128", {"training.seq_len": 1024, "training.global_batch_size": 32}),
    ],
)
def test_longer_runs_of_the_position_study(name: str, base: str, expected: dict[str, int]) -> None:
    assert differences(f"{POSITION}/{name}.toml", f"{POSITION}/{base}.toml") == expected


def test_the_recipe_of_the_position_study() -> None:
    """Dropout, biases and norms lie where torch's TransformerEncoderLayer has them; 3.2M and 10.6M parameters without tables."""
    config, model = loaded(f"{POSITION}/base.toml"), model_of(f"{POSITION}/base.toml")
    assert model.final_norm is None
    assert model.dropout.p == 0.1
    for block in model.blocks():
        attention, channel = block.mixer, block.channel
        assert isinstance(attention, Attention)
        assert isinstance(channel, HiddenChannel)
        assert attention.config.dropout == channel.config.dropout == block.mixer_dropout.p == block.channel_dropout.p == 0.1
        assert [type(norm) for norm in block.norms.values()] == [LayerNorm, LayerNorm]
    assert all(module.bias is not None for module in model.modules() if isinstance(module, nn.Linear))
    layer = nn.TransformerEncoderLayer(256, 4, dim_feedforward=1024)
    per_layer = sum(p.numel() for p in layer.parameters())
    assert cost_of(f"{POSITION}/base.toml").non_embedding_parameters == 4 * per_layer + 8192
    small = nn.TransformerEncoderLayer(384, 6, dim_feedforward=1536)
    assert cost_of(f"{POSITION}/small/alibi.toml").non_embedding_parameters == 6 * sum(p.numel() for p in small.parameters()) + 8192
    optimizer = config.optimizer.model_dump()
    assert {key: optimizer[key] for key in ("name", "lr", "beta1", "beta2", "eps", "weight_decay")} == {
        "name": "Adam",
        "lr": 2e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }


@pytest.mark.parametrize(
    ("arm", "sections"),
    [
        ("warmup", {"lr_scheduler"}),
        ("cosine", {"lr_scheduler"}),
        ("rmsnorm", {"model.norm"}),
        ("rope", {"model.position", "model.mixers"}),
        ("swiglu", {"model.channel"}),
        ("all", {"lr_scheduler", "model.norm", "model.position", "model.mixers", "model.channel"}),
    ],
)
def test_arms_of_the_course_lab_change_one_thing(arm: str, sections: set[str]) -> None:
    differing = differences(f"{COURSE}/{arm}.toml", f"{COURSE}/base.toml")
    assert {".".join(key.split(".")[: 1 if key.startswith("lr_") else 2]) for key in differing} == sections
    if arm == "swiglu":  # three matrices in place of two, and one more bias of 512 less 256 saved
        gained = 6 * ((3 * 192 * 512 + 2 * 512 + 192) - (2 * 192 * 768 + 768 + 192))
        assert cost_of(f"{COURSE}/{arm}.toml").parameters - cost_of(f"{COURSE}/base.toml").parameters == gained


MARCH = sorted(name for name in FILES if name.startswith("studies/march/"))


@pytest.mark.parametrize("name", [name for name in MARCH if "more_heads" not in name])
def test_marchs_arms_have_as_many_parameters(name: str) -> None:
    base = cost_of("studies/march/base.toml").non_embedding_parameters
    assert cost_of(name).non_embedding_parameters == pytest.approx(base, rel=0.01)


def test_marchs_base_has_36_million_parameters() -> None:
    assert cost_of("studies/march/base.toml").parameters == pytest.approx(36e6, rel=0.02)
    assert loaded("studies/march/base.toml").training.global_batch_size * loaded("studies/march/base.toml").training.seq_len == 1_048_576


ARCHITECTURES = sorted(name for name in FILES if name.startswith("architectures/"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_as_many_parameters_as_small(name: str) -> None:
    """Or as many active ones, where each token goes through a part of them."""
    small, cost = cost_of("small_alibi.toml").non_embedding_parameters, cost_of(name)
    assert small == pytest.approx(cost.non_embedding_parameters, rel=0.01) or small == pytest.approx(
        cost.active_parameters - cost.embedding_parameters, rel=0.01
    )


def kinds_in(table: Any) -> set[str]:
    """The names of all components in a [model] table."""
    if isinstance(table, dict):
        own = {table[key] for key in ("kind", "name") if isinstance(table.get(key), str)}
        return own.union(*(kinds_in(value) for value in table.values()))
    return set().union(*map(kinds_in, table)) if isinstance(table, list | tuple) else set()


def test_architectures_have_every_model_mixer_channel_mixer_and_linear_layer() -> None:
    """``external`` is whatever a user brings."""
    registries = (MODELS, MIXERS, CHANNELS, LINEARS)
    shipped = {name for registry in registries for name in registry if registry[name].__module__.startswith("titanarch.models.")}
    assert shipped - kinds_in([loaded(name).model.model_dump() for name in ARCHITECTURES]) == {"external"}


NOT_LARGE = [
    name for name in FILES if not name.startswith(("gpt_", "llama3_")) and (name.endswith("_cpu.toml") or "long_context" not in name)
]


@cache
def first_loss(name: str) -> tuple[float, float]:
    """What it is and what it should be.

    Of logits drawn from a normal distribution it is ln V and half their variance. T5's tied head reads embeddings of unit variance, so
    that the logit of the token that the decoder is given stands out: there it is the log-partition less the mean logit, as of labels
    that have nothing to do with the logits. There and in energy-based transformers, whose logits differ by 2 from token to token, the
    mean is over more targets.
    """
    config, is_t5 = loaded(name), name.endswith("encoder_decoder.toml")
    model = meta_model(config, 8192).to_empty(device="cpu")
    model.reset_parameters(Init(config.model.init, names=qualified_names(model), seed=1, n_layers=len(list(model.blocks()))))
    n_rows, length = 8 if is_t5 or name.startswith("architectures/ebt") else 2, 128
    tokens = torch.randint(8192, (n_rows, length + 1), generator=torch.Generator().manual_seed(0))
    seq = SequenceInfo.whole(n_rows, length, seed=1)
    with torch.no_grad():
        objective, logits = model(tokens[:, :-1], seq, tokens[:, 1:]), model.logits(tokens[:, :-1], seq)
    independent = (logits.logsumexp(-1) - logits.mean(-1)).mean() if is_t5 else math.log(logits.shape[-1]) + logits.var(-1).mean() / 2
    return float(objective.loss_sum / objective.n_targets), float(independent)


@pytest.mark.parametrize("name", NOT_LARGE)
def test_models_start_as_one_that_knows_nothing(name: str) -> None:
    found, expected = first_loss(next(other for other in NOT_LARGE if loaded(other).model == loaded(name).model))
    assert found == pytest.approx(expected, rel=0.02)
