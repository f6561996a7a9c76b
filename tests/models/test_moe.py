"""Mixture of experts against transformers' blocks and closed forms; channel mixers by layer."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import materialized, n_parameters, shape
from titanarch.contract.channel import CHANNELS
from titanarch.contract.model import MODELS
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.channels.moe import MoE
from titanarch.models.decoder import Decoder
from titanarch.models.decoder_config import DecoderConfig
from titanarch.ops.grouped_mm import grouped_mm, grouped_mm_operator

B, T, D, F_, E = 3, 10, 16, 24, 6
SEQ = SequenceInfo.whole(B, T)


def build(**table: object) -> MoE:
    config = CHANNELS.resolve({"kind": "moe", "n_experts": E, "d_ff": F_, **table})
    module = materialized(lambda: MoE(config, shape(D), 1)).double()
    cost = MoE.cost(config, shape(D))
    assert n_parameters(module) == cost.parameters
    used = config.top_k + config.n_shared
    assert cost.active_parameters == D * E + used * 3 * D * F_
    assert cost.forward_flops_per_token == 2 * cost.active_parameters
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(10)  # scores far enough apart, outputs of order 1
    return module


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return ((found - expected).abs().max() / expected.abs().max()).item()


def mixtral() -> tuple[MoE, nn.Module]:
    module = build(top_k=2)
    reference = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D, intermediate_size=F_, num_local_experts=E, num_experts_per_tok=2)
    ).double()
    return module, reference


def deepseek() -> tuple[MoE, nn.Module]:
    module = build(top_k=3, n_shared=2, scores="sigmoid", scaling_factor=2.5, bias_rate=1e-3, balance_weight=0.0)
    reference = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D, moe_intermediate_size=F_, n_routed_experts=E, num_experts_per_tok=3, n_shared_experts=2, n_group=1,
            topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        )
    ).double()  # fmt: skip
    with torch.no_grad():
        module.bias_E.copy_(torch.linspace(-0.2, 0.2, E))
        reference.get_buffer("gate.e_score_correction_bias").copy_(module.bias_E)
    return module, reference


@pytest.mark.parametrize("form", [mixtral, deepseek])
def test_outputs_and_gradients_are_transformers(form: Callable[[], tuple[MoE, nn.Module]]) -> None:
    module, reference = form()
    with torch.no_grad():
        for mine, theirs in _pairs(module, reference, grad=False):
            theirs.copy_(mine)
    (x, w), (x2, _) = inputs(), inputs()
    out = module(x, SEQ)
    expected = reference(x2)
    (out * w).sum().backward()
    (expected * w).sum().backward()
    # transformers' softmax and sigmoid are of fp32
    assert relative(out, expected) < 1e-6
    assert relative(x.grad, x2.grad) < 1e-6
    for mine, theirs in _pairs(module, reference, grad=True):
        assert relative(mine, theirs) < 1e-6


def _pairs(module: MoE, reference: nn.Module, *, grad: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of this module's tensors with the reference's that holds it."""

    def of(m: nn.Module, name: str) -> Tensor:
        p = m.get_parameter(name)
        if not grad:
            return p
        assert p.grad is not None, name
        return p.grad

    gate_up = of(reference, "experts.gate_up_proj")
    yield of(module, "router.weight"), of(reference, "gate.weight")
    yield of(module, "experts.gate_EFD"), gate_up[:, :F_]
    yield of(module, "experts.up_EFD"), gate_up[:, F_:]
    yield of(module, "experts.down_EDF"), of(reference, "experts.down_proj")
    if module.config.n_shared:
        for name in ("gate", "up", "down"):
            yield of(module, f"shared_{name}.weight"), of(reference, f"shared_experts.{name}_proj.weight")


def test_balance_and_z_losses() -> None:
    """That of transformers counts a token k times; over rows it is the mean of the rows' own."""
    for over in ("batch", "row"):
        module = build(balance_over=over)
        x, _ = inputs()
        _, carry = module.run(x.detach(), SEQ, Carry.empty())
        logits = (x @ module.router.weight.T).detach()
        parts = [logits.flatten(0, 1)] if over == "batch" else list(logits)
        expected = sum(float(load_balancing_loss_func((part,), E, 2)) / 2 for part in parts) / len(parts)
        balance, z = carry.aux["moe_balance"], carry.aux["moe_z"]
        assert (balance.total / balance.counted).item() == pytest.approx(expected, rel=1e-6)
        assert z.total.item() == pytest.approx(float(torch.log(torch.exp(logits).sum(-1)).square().mean()), rel=1e-6)
        assert (balance.weight, z.weight) == (0.01, 1e-3)
        counts = logits.topk(2).indices.flatten().bincount(minlength=E)
        assert float(carry.aux["moe_imbalance"].total) == pytest.approx(float(counts.max() / counts.double().mean()), rel=1e-6)
        assert float(carry.aux["moe_dropped"].total) == 0


def test_losses_add_up_over_blocks_and_metrics_are_averaged() -> None:
    first, second = build(), build()
    with torch.no_grad():
        second.router.weight.mul_(-0.5)
    x, _ = inputs()
    alone = [m.run(x, SEQ, Carry.empty())[1].aux for m in (first, second)]
    both = second.run(x, SEQ, first.run(x, SEQ, Carry.empty())[1])[1].aux
    for name, n in (("moe_balance", 1), ("moe_z", 1), ("moe_imbalance", 2)):
        expected = sum(float(aux[name].total) for aux in alone)
        assert float(both[name].total) == pytest.approx(expected, rel=1e-6)
        assert float(both[name].counted) == n
    assert first.eval().run(x, SEQ, Carry.empty())[1].aux == {}


def test_balance_loss_is_one_where_all_is_even_and_the_share_scales_gradients_alone() -> None:
    module = build(top_k=E)
    with torch.no_grad():
        module.router.weight.zero_()
    x, _ = inputs()
    assert float(module.run(x, SEQ, Carry.empty())[1].aux["moe_balance"].total) == pytest.approx(1.0, rel=1e-6)
    losses, grads = [], []
    for share in (1.0, 0.25):
        module = build()
        module.share = share
        aux = module.run(x, SEQ, Carry.empty())[1].aux
        (aux["moe_balance"].total + aux["moe_z"].total).backward()
        losses.append(float(aux["moe_z"].total))
        assert module.router.weight.grad is not None
        grads.append(module.router.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert relative(grads[1] * 4, grads[0]) < 1e-6


def test_the_bias_moves_against_the_load_and_changes_the_choice_alone() -> None:
    module = build(bias_rate=0.1, scores="sigmoid")
    x, _ = inputs()
    before = module(x, SEQ)
    for _ in range(2):  # micro-batches
        module.run(x, SEQ, Carry.empty())
    counts = 2 * torch.sigmoid(x @ module.router.weight.T).topk(2).indices.flatten().bincount(minlength=E)
    assert torch.equal(module.tokens_E, counts.double())
    module.after_skip()  # of a step that is not made nothing is counted
    for _ in range(2):
        module.run(x, SEQ, Carry.empty())
    assert torch.equal(module.tokens_E, counts.double())
    module.after_update()
    assert torch.allclose(module.bias_E, 0.1 * torch.sign(counts.double().mean() - counts).double())
    assert module.tokens_E.abs().sum() == 0
    with torch.no_grad():
        module.bias_E.fill_(3.0)  # all alike: the choice is as without, and so are the weights
    assert torch.equal(module(x, SEQ), before)
    for name in ("bias_E", "tokens_E"):
        assert (name in module.state_dict()) == (name == "bias_E")
    assert "bias_E" not in build().state_dict()


def test_grouped_products_and_their_derivatives() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # one group is empty
    expected = torch.stack([w[e] @ x[n] for n, e in enumerate([0, 0, 2, 2, 2, 2, 3])])
    assert torch.allclose(grouped_mm(x, w, ends), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, ends), (x, w))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, ends), (x, w))
    torch.library.opcheck(grouped_mm_operator, (x, w, ends))
    half = grouped_mm(x.bfloat16(), w.bfloat16(), ends)
    assert half.dtype is torch.bfloat16
    assert relative(half.double(), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_whole_in_any_dtype(dtype: torch.dtype) -> None:
    module = build(top_k=2, n_shared=1, bias_rate=1e-3).to(dtype)
    module.router.float()  # an FSDP unit of its own, which stays fp32
    x = inputs()[0].detach().to(dtype)
    eager, carry = module.run(x, SEQ, Carry.empty())
    counted = module.tokens_E.clone()
    torch._dynamo.reset()
    compiled, found = torch.compile(module.run, backend="aot_eager", fullgraph=True, dynamic=False)(x, SEQ, Carry.empty())
    assert relative(compiled, eager) < (1e-6 if dtype is torch.float32 else 1e-2)
    assert float(found.aux["moe_z"].total) == pytest.approx(float(carry.aux["moe_z"].total), rel=1e-6)
    assert torch.equal(module.tokens_E, 2 * counted)
    assert eager.dtype is dtype


def test_roles() -> None:
    roles = roles_of(build(n_shared=1))
    assert all(role.decay for role in roles.values())
    assert {name for name, role in roles.items() if role.muon} == {f"shared_{part}.weight" for part in ("gate", "up", "down")}


MODEL = {"n_layers": 4, "d_model": D, "n_heads": 2, "channel": {"kind": "mlp"}}


def test_channel_mixers_by_layer() -> None:
    table = {**MODEL, "channel_layers": ["channel", "channel", "moe", "wide"], "channels": {"wide": {"kind": "swiglu", "d_ff": 96}}}
    config = DecoderConfig.model_validate(table)
    assert [config.channel_of(layer).kind for layer in range(4)] == ["mlp", "mlp", "moe", "swiglu"]
    assert MODELS.resolve(config.model_dump(exclude_none=True)) == config
    model = materialized(lambda: Decoder(config, 50, 16))
    assert Decoder.cost(config, 50, 16).parameters == n_parameters(model)
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    objective = model(tokens[:, :-1], SequenceInfo.whole(2, 16), tokens[:, 1:])
    assert set(objective.aux) == {"moe_balance", "moe_z", "moe_imbalance", "moe_dropped"}
    plain = DecoderConfig.model_validate(MODEL)
    assert {plain.channel_of(layer).kind for layer in range(4)} == {"mlp"}
    assert plain.channels == {}


def test_decoding_by_steps_is_the_whole_forward() -> None:
    table = {**MODEL, "channel_layers": ["channel", "moe"], "channels": {"moe": {"n_shared": 1}}, "position": {"relative": "rotary"}}
    model = materialized(lambda: Decoder(DecoderConfig.model_validate(table), 50, 16)).double().eval()
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, states = model.logits(tokens, SequenceInfo.whole(2, 9)), model.initial_state(2)
    for index in range(9):
        logits, states = model.step(tokens[:, index : index + 1], index, states)
        assert relative(logits, whole[:, index]) < 1e-10


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"top_k": 9}, "top_k \\(9\\) is above n_experts \\(8\\)"),
        ({"expert_parallel_degree": 2}, "expert_parallel_degree"),
        ({"d_ff": 0}, "d_ff"),
        ({"scores": "relu"}, "scores"),
    ],
)
def test_wrong_tables_are_refused(table: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CHANNELS.resolve({"kind": "moe", **table})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"channel_layers": ["channel", "moes"]}, "unknown channel mixer 'moes'; did you mean 'moe'"),
        ({"channel_layers": []}, "channel_layers is empty"),
        ({"channels": {"channel": {"kind": "moe"}}}, "call this table something else"),
    ],
)
def test_wrong_patterns_are_one_error(table: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as error:
        DecoderConfig.model_validate({**MODEL, **table})
    assert error.value.error_count() == 1


def test_experts_apply_to_a_token_alone() -> None:
    """A naive sum over every expert, weighted by 0 where it was not chosen."""
    module = build(top_k=2, normalize=False)
    x, _ = inputs()
    e = module.experts
    scores = (x @ module.router.weight.T).softmax(-1)
    weights = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, scores.topk(2).values)
    hidden = F.silu(torch.einsum("btd,efd->btef", x, e.gate_EFD)) * torch.einsum("btd,efd->btef", x, e.up_EFD)
    expected = torch.einsum("btef,edf,bte->btd", hidden, e.down_EDF, weights)
    assert relative(module(x, SEQ), expected) < 1e-10
    other = dataclasses.replace(SEQ, document_BT=SEQ.document_BT + 1)
    assert torch.equal(module(x[:, 4:], other), module(x[:, 4:], SEQ))
