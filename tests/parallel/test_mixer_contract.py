"""The contract, proven before anything rests on it: attention and a toy SSM give on several processes what they give on one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.fixtures.toy_ssm import ToySSM, ToySSMConfig
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.mixer import MIXERS as MIXERS_BY_KIND
from titanarch.contract.mixer import SequenceMixer, Streams
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.side_channels import Carry
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.attention import Attention, AttentionConfig
from titanarch.models.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from titanarch.models.mixers.kda import KDA, KDAConfig
from titanarch.models.mixers.rwkv7 import RWKV7, RWKV7Config
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.context_parallel import apply_context_parallel
from titanarch.parallel.tensor_parallel import apply_tensor_parallel

B, T, D = 2, 16, 16
SHAPE = ModelShape(d_model=D, vocab_size=32, seq_len=T, layers=("mixer",))


DEEP = ModelShape(d_model=D, vocab_size=32, seq_len=T, layers=("mixer", "mixer"))


class LaterRWKV7(RWKV7):
    """RWKV-7 of a second block, given values of a first one, with weights that are not zero."""

    def reset_parameters(self, init: Init) -> None:
        for module in self.modules():
            for name, _ in module.named_parameters(recurse=False):
                init.normal(module, name, 0.4)

    def project(self, x_BTD: torch.Tensor, seq: SequenceInfo, carry: Carry) -> tuple[Streams, Carry]:
        return super().project(x_BTD, seq, carry.with_value("v_first.mixer", torch.sin(self.wv(x_BTD))))


def attention(**options: object) -> Attention:
    return Attention(AttentionConfig.model_validate({"n_heads": 4, **options}), SHAPE, 0)


def mixer(kind: str, **options: object) -> SequenceMixer:
    """A registered mixer in block 1, where lambda_init is not what it is in block 0."""
    config = MIXERS_BY_KIND.resolve({"kind": kind, "n_heads": 4, **options})
    built = MIXERS_BY_KIND.of(config)(config, SHAPE, 1)
    assert isinstance(built, SequenceMixer)
    return built


MIXERS = {
    "alibi": lambda: attention(position="alibi"),
    "gqa_everything": lambda: attention(
        n_kv_heads=2, position=["linear_cpb", "rotary"], window=5, soft_cap=5.0, qk_norm=True, sinks=True, output_gate=True,
        qkv_bias=True, out_bias=True,
    ),
    "mqa": lambda: attention(n_kv_heads=1, position="rotary"),
    "dropout": lambda: attention(dropout=0.3),
    "window_shorter_than_a_part": lambda: attention(window=2, sinks=True, position="t5", dropout=0.2),
    "diff_attention": lambda: mixer("diff_attention", position=["rotary", "linear_cpb"], sinks=True, dropout=0.2),
    "diff_attention_gqa": lambda: mixer("diff_attention", n_kv_heads=2, window=5, output_gate=True, qk_norm=True),
    "diff_attention_v2_gqa": lambda: mixer(
        "diff_attention_v2", n_kv_heads=2, position=["rotary", "linear_cpb"], sinks=True, dropout=0.2, output_gate=True,
    ),
    "mla": lambda: mixer("mla", position="rotary"),
    "mla_everything": lambda: mixer(
        "mla", q_rank=6, rotary_dim=2, value_dim=3, kv_rank=10, position=["linear_cpb", "rotary"], window=9, sinks=True, output_gate=True,
        dropout=0.1,
    ),
    "mamba2": lambda: mixer("mamba2", head_dim=8, state_dim=3, n_groups=2),
    "gla": lambda: mixer("gla"),
    "retnet": lambda: mixer("retnet"),
    "toy_ssm": lambda: ToySSM(ToySSMConfig(), SHAPE, 0),
    "toy_ssm_four_heads": lambda: ToySSM(ToySSMConfig(n_heads=4, n_groups=2), SHAPE, 0),
    "gated_delta_net": lambda: GatedDeltaNet(GatedDeltaNetConfig(n_heads=4, n_key_heads=2), SHAPE, 0),
    "kda": lambda: KDA(KDAConfig(n_heads=4), SHAPE, 0),
    "rwkv7": lambda: LaterRWKV7(RWKV7Config(n_heads=4), DEEP, 1),
}  # fmt: skip
RECURRENT = ("mamba2", "gla", "retnet", "toy_ssm", "toy_ssm_four_heads", "gated_delta_net", "kda", "rwkv7")
ATTENTION = [name for name in MIXERS if name not in RECURRENT]
CASES_OF_TWO = (
    [(name, "tensor") for name in MIXERS]
    + [(name, "heads") for name in MIXERS]
    + [(name, "gather") for name in ATTENTION]
    + [(name, "head_tail gather") for name in ATTENTION]
    + [(name, "ring") for name in ATTENTION]
    + [(name, "head_tail ring") for name in ATTENTION]
    + [(name, "head_tail heads") for name in MIXERS]
    + [(name, "state") for name in RECURRENT]
)
# Head-tail parts are of two tokens, as far as the toy SSM looks back.
CASES_OF_FOUR = [(name, method) for name in ATTENTION for method in ("ring", "head_tail ring")] + [
    ("gqa_everything", "head_tail gather"),
    ("mqa", "head_tail heads"),
    *((name, "state") for name in RECURRENT if name != "toy_ssm"),
]


def build(name: str) -> SequenceMixer:
    mixer = MIXERS[name]().double()
    mixer.reset_parameters(Init(InitConfig(std=0.3), names=qualified_names(mixer), seed=1, n_layers=1))
    return mixer


def packed_rows() -> SequenceInfo:
    """Row 0 is documents of 5 and 11 tokens, row 1 of 8 and 8: one begins inside a part, one with a part."""
    return SequenceInfo.of_lengths([(n, T - n) for n in (5, 8)], seed=0, first_row=3)


def outcome(mixer: SequenceMixer, x: torch.Tensor, seq: SequenceInfo, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and the gradients of input and parameters, for the loss sum(output * weights)."""
    x = x.clone().requires_grad_()
    y, _ = mixer(x, seq, Carry.empty())
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in mixer.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64), torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def on_every_process(cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Every case on this process, its results made whole again."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    group = mesh.get_group()
    results = {}
    for name, method in cases:
        mixer, seq, (x, weights) = build(name), packed_rows(), inputs()
        if method == "tensor":
            apply_tensor_parallel(mixer, mesh)
            found = outcome(mixer, x, seq, weights)
            results[name, method] = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}
            continue
        layout = ContextLayout(group, head_tail=method.startswith("head_tail"))
        apply_context_parallel(mixer, layout, ContextParallel(method.removeprefix("head_tail ")))
        found = outcome(mixer, layout.own(x, 1), layout.divide(seq), layout.own(weights, 1))
        for key, value in found.items():
            if key in ("output", "input"):
                gathered = [torch.empty_like(value) for _ in range(world_size)]
                dist.all_gather(gathered, value.contiguous())
                found[key] = layout.in_order(torch.cat(gathered, 1))
            else:
                dist.all_reduce(value)
        results[name, method] = found
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str], dict[str, torch.Tensor]]]:
    return run_distributed(on_every_process, 2, CASES_OF_TWO)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[tuple[str, str], dict[str, torch.Tensor]]]:
    return run_distributed(on_every_process, 4, CASES_OF_FOUR)


@pytest.mark.parametrize(("name", "method"), CASES_OF_TWO)
def test_two_processes_equal_one(two_ranks, name: str, method: str) -> None:
    assert_equal_one(two_ranks, name, method)


@pytest.mark.parametrize(("name", "method"), CASES_OF_FOUR)
def test_four_processes_equal_one(four_ranks, name: str, method: str) -> None:
    assert_equal_one(four_ranks, name, method)


def assert_equal_one(ranks: list[dict[tuple[str, str], dict[str, torch.Tensor]]], name: str, method: str) -> None:
    x, weights = inputs()
    expected = outcome(build(name), x, packed_rows(), weights)
    for found in ranks:
        assert found[name, method].keys() == expected.keys()
        for key, value in expected.items():
            assert value is not None, f"{key} had no gradient on one process"
            torch.testing.assert_close(found[name, method][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def refusal() -> str:
    mixer = build("toy_ssm")
    mixer.tensor_parallel = {k: v for k, v in mixer.tensor_parallel.items() if k != "gain_P"}
    with pytest.raises(ValueError, match="does not declare") as error:
        apply_tensor_parallel(mixer, init_device_mesh("cpu", (1,)))
    return str(error.value)


def test_an_undeclared_parameter_is_refused() -> None:
    assert "gain_P" in run_distributed(refusal, 1)[0]
