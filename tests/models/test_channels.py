"""Channel mixers against transformers' feed-forward layers, and what all of them must keep."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, T5Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from tests.models.materialize import materialized, n_parameters, shape
from titanarch.contract.channel import CHANNELS, ChannelMixer
from titanarch.contract.init import Scheme
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.split import Split
from titanarch.models.channels.hidden import HiddenChannel, HiddenConfig

D = 32
GLUS = ["reglu", "geglu", "swiglu", "bilinear", "mixed_act"]
KINDS = ["mlp", *GLUS]
SEQ = SequenceInfo.whole(2, 6)


def build(table: str | dict[str, object], *, layer: int = 0, scheme: Scheme = "gpt2") -> ChannelMixer:
    config = CHANNELS.resolve(table)
    component = CHANNELS.of(config)
    module = materialized(lambda: component(config, shape(D), layer), scheme=scheme)
    cost = component.cost(config, shape(D))
    assert n_parameters(module) == cost.parameters
    assert cost.forward_flops_per_token == sum(2 * p.numel() for p in module.parameters() if p.dim() == 2)
    return module


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in module.named_parameters()}


def test_all_kinds_are_registered() -> None:
    assert set(CHANNELS) >= {*KINDS, "none"}


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_declarations_name_every_child_and_gradients_flow(kind: str, bias: bool) -> None:
    module = build(kind if kind == "none" else {"kind": kind, "bias": bias})
    assert set(module.tensor_parallel) == {name for name, _ in module.named_children()}
    linears = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    assert module.float8 == linears
    assert {name for name, split in module.tensor_parallel.items() if split == Split.ROW} == linears & {"down"}
    x = torch.randn(2, 6, D)
    out = module(x, SEQ)
    assert out.shape == x.shape
    if kind == "none":
        assert torch.equal(out, torch.zeros_like(x))
        return
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("activation", "name"), [("gelu", "gelu"), ({"kind": "gelu", "approximate": "tanh"}, "gelu_new"), ("relu2", "relu2")], ids=str
)
def test_mlp_is_gpt2_s(activation: str | dict[str, object], name: str) -> None:
    module = build({"kind": "mlp", "bias": True, "activation": activation}).double()
    reference = GPT2MLP(128, GPT2Config(n_embd=D, activation_function=name, resid_pdrop=0.0)).double()
    ours = weights(module)
    reference.load_state_dict(
        {
            "c_fc.weight": ours["up.weight"].T,
            "c_fc.bias": ours["up.bias"],
            "c_proj.weight": ours["down.weight"].T,
            "c_proj.bias": ours["down.bias"],
        }
    )
    x = torch.randn(2, 6, D, dtype=torch.float64)
    assert (module(x, SEQ) - reference(x)).abs().max() < 1e-10


def test_mlp_is_t5_s() -> None:
    module = build({"kind": "mlp", "activation": "relu", "d_ff": 48}).double()
    reference = T5DenseActDense(T5Config(d_model=D, d_ff=48, feed_forward_proj="relu", dropout_rate=0.0)).double()
    ours = weights(module)
    reference.load_state_dict({"wi.weight": ours["up.weight"], "wo.weight": ours["down.weight"]})
    x = torch.randn(2, 6, D, dtype=torch.float64)
    assert (module(x, SEQ) - reference(x)).abs().max() < 1e-10


@pytest.mark.parametrize(("kind", "name"), [("swiglu", "silu"), ("reglu", "relu"), ("geglu", "gelu"), ("bilinear", "linear")])
def test_gated_is_llama_s(kind: str, name: str) -> None:
    module = build({"kind": kind, "d_ff": 40, "bias": True}).double()
    reference = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=40, hidden_act=name, mlp_bias=True)).double()
    reference.load_state_dict({name.replace(".", "_proj."): value for name, value in weights(module).items()})
    x = torch.randn(2, 6, D, dtype=torch.float64)
    assert (module(x, SEQ) - reference(x)).abs().max() < 1e-10


def test_geglu_with_tanh_is_t5_s() -> None:
    module = build({"kind": "geglu", "d_ff": 40, "approximate": "tanh"}).double()
    reference = T5DenseGatedActDense(T5Config(d_model=D, d_ff=40, feed_forward_proj="gated-gelu", dropout_rate=0.0)).double()
    ours = weights(module)
    reference.load_state_dict({"wi_0.weight": ours["gate.weight"], "wi_1.weight": ours["up.weight"], "wo.weight": ours["down.weight"]})
    x = torch.randn(2, 6, D, dtype=torch.float64)
    assert (module(x, SEQ) - reference(x)).abs().max() < 1e-10


@pytest.mark.parametrize(("combine", "divisor"), [("mean", 2), ("sum", 1)])
def test_mixed_act(combine: str, divisor: int) -> None:
    module = build({"kind": "mixed_act", "combine": combine}).double()
    w, x = weights(module), torch.randn(2, 6, D, dtype=torch.float64)
    hidden = 1 / (1 + torch.exp(-x @ w["gate.weight"].T)) + (x @ w["up.weight"].T).clamp(min=0)
    assert (module(x, SEQ) - hidden / divisor @ w["down.weight"].T).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("table", "d_model", "units"),
    [
        ("mlp", 384, 1536),
        ("swiglu", 768, 2048),
        ("swiglu", 384, 1024),
        ("swiglu", 512, 1408),
        ("geglu", 4096, 10944),
        ({"kind": "swiglu", "multiple_of": 256}, 4096, 11008),
        ({"kind": "mlp", "expansion": 2.5}, 10, 25),
        ({"kind": "reglu", "d_ff": 77}, 384, 77),
    ],
    ids=str,
)
def test_hidden_units(table: str | dict[str, object], d_model: int, units: int) -> None:
    config = CHANNELS.resolve(table)
    assert isinstance(config, HiddenConfig)
    assert config.hidden_units(d_model) == units
    with torch.device("meta"):
        module = CHANNELS.of(config)(config, shape(d_model), 0)
    assert module.get_parameter("down.weight").shape == (d_model, units)
    # What COLUMN("d_ff") counts is there, and the resolved table is a valid one.
    assert isinstance(module, HiddenChannel)
    assert module.config.d_ff == units
    assert CHANNELS.resolve(module.config.model_dump(exclude_none=True)) == module.config


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_units_is_half_of_the_sum(kind: str) -> None:
    """What tensor parallelism relies on: hidden units are independent of each other, dropout included."""
    table = {
        "kind": kind,
        "d_ff": 64,
        "dropout": 0.25,
        **({"activation": {"kind": "mixed", "activations": ["relu", "silu"]}} if kind == "mlp" else {}),
    }
    whole, seq = build(table), SequenceInfo.whole(2, 6, seed=5)
    x, total = torch.randn(2, 6, D), torch.zeros(2, 6, D)
    for half in range(2):
        part = build({**table, "d_ff": 32})
        assert isinstance(part, HiddenChannel)
        part.first_unit = 32 * half
        rows = slice(32 * half, 32 * half + 32)
        part.load_state_dict({n: p[:, rows] if n.startswith("down") else p[rows] for n, p in whole.state_dict().items()})
        total = total + part(x, seq)
    assert (total - whole(x, seq)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_keyed_and_only_in_training(kind: str) -> None:
    x = torch.randn(2, 6, D)
    module, dry = build({"kind": kind, "dropout": 0.5}), build(kind)
    seq = SequenceInfo.whole(2, 6, seed=3)
    out = module(x, seq)
    assert torch.equal(out, module(x, seq))
    assert torch.equal(module(x, SEQ), dry(x, SEQ))
    assert torch.equal(dry(x, seq), dry(x, SEQ))
    assert not torch.allclose(out, dry(x, SEQ))
    assert not torch.equal(out, module(x, dataclasses.replace(seq, seed=4)))
    other = build({"kind": kind, "dropout": 0.5}, layer=1)
    other.load_state_dict(module.state_dict())
    assert not torch.equal(out, other(x, seq))
    later = dataclasses.replace(seq, index_T=seq.index_T[3:], position_BT=seq.position_BT[:, 3:])
    assert (module(x[:, 3:], later) - out[:, 3:]).abs().max() < 1e-6


def test_dropout_keeps_units_with_their_probability_and_scale() -> None:
    module = build({"kind": "mlp", "d_ff": 2000, "dropout": 0.2, "activation": "identity"})
    with torch.no_grad():
        module.get_parameter("up.weight").fill_(1 / D)
        module.get_parameter("down.weight").fill_(1 / 2000)
    out = module(torch.ones(2, 6, D), SequenceInfo.whole(2, 6, seed=1))
    # The mean of 2,000 kept-or-dropped units of 1.25: 1 +- 0.011.
    assert (out - 1).abs().max() < 0.05
    assert out.std() > 1e-3


@pytest.mark.parametrize(
    ("scheme", "inward", "outward"),
    [("gpt2", 0.02, 0.01), ("pytorch", 1 / math.sqrt(3 * D), 1 / math.sqrt(3 * 512)), ("depth_scaled", 0.02, 0.02 / math.sqrt(4))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights(kind: str, scheme: Scheme, inward: float, outward: float) -> None:
    module = build({"kind": kind, "d_ff": 512, "bias": True}, layer=1, scheme=scheme)
    for name, p in module.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(outward if name.startswith("down") else inward, rel=0.05), name
        elif scheme != "pytorch":
            assert torch.equal(p, torch.zeros_like(p)), name


def test_swiglu_is_the_formula_on_low_precision_too() -> None:
    module = build("swiglu").bfloat16()
    w, x = weights(module), torch.randn(2, 6, D).bfloat16()
    exact = (F.silu(x.double() @ w["gate.weight"].T) * (x.double() @ w["up.weight"].T)) @ w["down.weight"].T
    assert ((module(x, SEQ).double() - exact).abs() / exact.abs().max()).max() < 0.02


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "mlp", "d_ff": 0},
        {"kind": "mlp", "d_ff": 64, "expansion": 4.0},
        {"kind": "swiglu", "d_ff": 64, "multiple_of": 64},
        {"kind": "swiglu", "activation": "relu"},
        {"kind": "mlp", "dropout": 1.0},
        {"kind": "reglu", "approximate": "tanh"},
        {"kind": "none", "d_ff": 4},
    ],
    ids=str,
)
def test_wrong_tables_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CHANNELS.resolve(table)
