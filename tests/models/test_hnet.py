"""H-Net: a loop over tokens and documents, causality, packing, capacity, decoding, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parallel.divided import divided_model
from titanarch.config.errors import ConfigError
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.model import Objective
from titanarch.contract.roles import roles_of
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.hnet import chunks as chunking
from titanarch.models.hnet.config import HNetConfig
from titanarch.models.hnet.model import HNet
from titanarch.models.hnet.ratio import ratio_terms
from titanarch.models.hnet.stage import Stack
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.mesh import Degrees
from titanarch.train.local_optimizers import shard_of

V, T = 41, 32
LENGTHS = (9, 1, 22)
BASE: dict[str, Any] = {"d_model": 16, "n_heads": 2, "channel": {"kind": "mlp", "d_ff": 24}, "init": {"std": 0.3}}
ATTENTION = {"layers": ["attention"]}
ONE_STAGE = {"stages": [{"encoder": ATTENTION, "decoder": ATTENTION, "ratio": 3.0}], "main": ATTENTION, "position": {"relative": "rotary"}}
TWO_STAGES = {
    "stages": [
        {"encoder": {"layers": ["mamba2"]}, "decoder": {"layers": ["mamba2", "attention"]}, "channel": "none", "ratio": 2.0},
        {"encoder": ATTENTION, "decoder": ATTENTION, "d_model": 24, "ratio": 1.5},
    ],
    "main": {"layers": ["attention"], "n_layers": 2, "d_model": 32, "channel": {"kind": "swiglu", "d_ff": 20}},
    "position": {"relative": ["rotary", "alibi"]},
    "mixers": {"mamba2": {"head_dim": 8, "state_dim": 4}},
}
VARIANTS = {"one_stage": ONE_STAGE, "two_stages": TWO_STAGES, "post_norm": {**ONE_STAGE, "residual": "post_norm"}}


def hnet(table: dict[str, Any], *, seed: int = 0) -> HNet:
    """In float64; what starts at zero or at the identity is moved, so that every part and every gradient counts."""
    config = HNetConfig.model_validate({**BASE, **table})
    model = HNet(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=seed, n_layers=9))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stage in model.bare_stages():
            moved = [stage.router.wq.weight, stage.router.wk.weight, *stage.residual.parameters(), *stage.parameters(recurse=False)]
            for parameter in moved:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def tokens(n_rows: int = 1) -> Tensor:
    return torch.randint(V, (n_rows, T), generator=torch.Generator().manual_seed(1))


def packed() -> SequenceInfo:
    """A row of three documents."""
    return replace(
        SequenceInfo.whole(1, T),
        position_BT=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        document_BT=torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None],
        packed=True,
    )


class Oracle:
    """The equations a document and a token at a time; only the blocks are the model's. ``p``: each stage's probabilities."""

    def __init__(self, model: HNet) -> None:
        self.model = model
        self.p: list[list[Tensor]] = [[] for _ in model.stages]

    def hidden(self, tokens_T: Tensor) -> Tensor:
        x = self.level(0, self.model.embedding.weight[tokens_T])
        return x if self.model.final_norm is None else self.model.final_norm(x)

    def level(self, number: int, x_TD: Tensor) -> Tensor:
        if number == len(self.model.stages):
            return self.blocks(self.model.main, x_TD)
        stage = self.model.bare_stages()[number]
        x_TD = self.blocks(stage.encoder, x_TD)
        p = [x_TD.new_ones(())]
        for t in range(1, len(x_TD)):
            q, k = stage.router.wq.weight @ x_TD[t - 1], stage.router.wk.weight @ x_TD[t]
            p.append((1 - (q @ k) / (q @ q).sqrt() / (k @ k).sqrt()) / 2)
        self.p[number] += p
        begins = [t for t in range(len(p)) if p[t] > 0.5]
        wider = [torch.cat([x_TD[t], stage.pad_P]) if "pad_P" in stage._parameters else x_TD[t] for t in begins]
        z = iter(self.level(number + 1, torch.stack(wider)))
        out, average = [], torch.zeros_like(x_TD[0])
        for t in range(len(x_TD)):
            if t in begins:
                weight = p[t] if t == 0 else p[t].clamp(1e-4, 1 - 1e-4)
                average = weight * next(z)[: len(x_TD[t])] + (1 - weight) * average
            decided = p[t] if t in begins else 1 - p[t]
            residual = stage.residual.linear.weight @ x_TD[t] + stage.residual.linear.bias
            out.append(average * (decided + (1 - decided).detach()) + residual)
        return self.blocks(stage.decoder, torch.stack(out))

    def blocks(self, stack: Stack, x_TD: Tensor) -> Tensor:
        x = x_TD[None]
        for block in stack.bare_blocks:
            x, _ = block(x, SequenceInfo.whole(1, len(x_TD)), Carry.empty())
        return (x if stack.norm is None else stack.norm(x))[0]

    def ratio_loss(self, number: int) -> Tensor:
        N, p = self.model.config.stages[number].ratio, torch.stack(self.p[number])
        share = (p > 0.5).double().mean()
        return N / (N - 1) * ((N - 1) * share * p.mean() + (1 - share) * (1 - p.mean()))


def gradients(model: HNet, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def ratio_loss(objective: Objective, number: int) -> Tensor:
    aux = objective.aux[f"ratio_loss_{number}"]
    assert aux.weight == 0.03
    return aux.total / aux.counted


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loop_over_tokens_has_the_same_outputs_and_gradients(name: str) -> None:
    model, row = hnet(VARIANTS[name]), tokens()
    labels = row.roll(-1, 1)
    objective = model(row, packed(), labels)
    oracle = Oracle(model)
    hidden = torch.cat([oracle.hidden(part) for part in row[0].split(LENGTHS)])
    torch.testing.assert_close(model.logits(row, packed())[0], hidden @ model.head.weight.T, rtol=1e-10, atol=1e-10)
    expected = F.cross_entropy(hidden @ model.head.weight.T, labels[0], reduction="sum")
    found = objective.total
    for number in range(len(model.stages)):
        p = torch.stack(oracle.p[number])
        n_begun = int((p > 0.5).sum())
        assert len(LENGTHS) < n_begun < len(p)
        compression = objective.aux[f"compression_{number}"]
        assert (compression.total.item(), compression.counted.item(), compression.weight) == (len(p), n_begun, 0)
        torch.testing.assert_close(ratio_loss(objective, number), oracle.ratio_loss(number), rtol=1e-10, atol=1e-10)
        found, expected = found + 7.0 * ratio_loss(objective, number), expected + 7.0 * oracle.ratio_loss(number)
    mine, its = gradients(model, found), gradients(model, expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in its.values())
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


def test_where_every_token_begins_a_chunk_it_is_a_plain_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MOST_WEIGHT", 1 - 1e-14)
    model, row = hnet(TWO_STAGES), tokens(2)
    for stage in model.bare_stages():
        monkeypatch.setattr(stage.router, "forward", lambda x, seq: torch.ones_like(x[..., 0]))
    seq = SequenceInfo.whole(2, T)
    streams, x = [], model.embedding(row)
    for stage in model.bare_stages():
        x = _whole(stage.encoder, x, seq)
        streams.append(x)
        x = torch.cat([x, stage.pad_P.expand(2, T, -1)], -1)
    x = _whole(model.main, x, seq)
    for stage in reversed(model.bare_stages()):
        encoded = streams.pop()
        x = _whole(stage.decoder, stage.residual(x[..., : encoded.shape[-1]], encoded), seq)
    assert model.final_norm is not None
    torch.testing.assert_close(model.logits(row, seq), model.head(model.final_norm(x)), rtol=1e-10, atol=1e-10)


def _whole(stack: Stack, x: Tensor, seq: SequenceInfo) -> Tensor:
    for block in stack.bare_blocks:
        x, _ = block(x, seq, Carry.empty())
    return stack.normed(x)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_a_later_one(name: str) -> None:
    model, row, j = hnet(VARIANTS[name]), tokens(2), 11
    changed = row.clone()
    changed[:, j] = (changed[:, j] + 1) % V
    with torch.no_grad():
        before, after = (model.logits(x, SequenceInfo.whole(2, T)) for x in (row, changed))
    torch.testing.assert_close(before[:, :j], after[:, :j], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, j:], after[:, j:])


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    model, row = hnet(VARIANTS[name]), tokens()
    with torch.no_grad():
        together = model.logits(row, packed())
        apart = [model.logits(part, SequenceInfo.whole(1, part.shape[1])) for part in row.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_by_step_equals_the_whole_forward(name: str) -> None:
    model, row = hnet(VARIANTS[name]), tokens(2)
    with torch.no_grad():
        whole, states = model.logits(row, SequenceInfo.whole(2, T)), model.initial_state(2)
        for index in range(T):
            logits, states = model.step(row[:, index : index + 1], index, states)
            torch.testing.assert_close(logits, whole[:, index], rtol=1e-10, atol=1e-10)


def with_capacity(table: dict[str, Any], capacity: float) -> dict[str, Any]:
    return {**table, "stages": [{**stage, "capacity": capacity} for stage in table["stages"]]}


def test_fewer_slots_change_nothing_while_the_chunks_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    row, losses = tokens(), []
    for capacity in (1.0, 0.5):
        model = hnet(with_capacity(TWO_STAGES, capacity))
        for stage in model.bare_stages():
            monkeypatch.setattr(stage.router, "between", lambda a, b, between=stage.router.between: 0.65 * between(a, b))
        objective = model(row, packed(), row)
        slots, tokens_seen = objective.aux["compression_0"].counted, objective.aux["compression_1"].total
        assert (objective.aux["overflow_0"].total.item(), objective.aux["overflow_1"].total.item()) == (0, 0)
        assert slots == tokens_seen <= 16
        losses.append({"loss": objective.total, **gradients(model, objective.total + ratio_loss(objective, 1))})
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)


def test_boundaries_beyond_the_slots_are_none_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is a boundary, and there are 16 slots: those of documents 0 and 1, and 6 of document 2's 22."""
    exact, fewer, row = hnet(ONE_STAGE), hnet(with_capacity(ONE_STAGE, 0.5)), tokens()
    seen: list[Tensor] = []
    for model in (exact, fewer):
        (stage,) = model.bare_stages()
        monkeypatch.setattr(stage.router, "forward", lambda x, seq: torch.full_like(x[..., 0], 0.9))
        stage.residual.register_forward_hook(lambda part, args, out: seen.append(args[0]))
    logits = [model.logits(row, packed()) for model in (exact, fewer)]
    torch.testing.assert_close(logits[0][:, :16], logits[1][:, :16], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits[0][:, 16:], logits[1][:, 16:])
    torch.testing.assert_close(seen[1][:, 16:], seen[1][:, 15:16].expand(-1, T - 16, -1))
    aux = fewer(row, packed(), row).aux
    assert (aux["overflow_0"].total.item(), aux["compression_0"].counted.item(), aux["overflow_0"].weight) == (16, 16, 0)


def test_a_document_without_a_slot_reads_no_other_documents_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = hnet(with_capacity(ONE_STAGE, 0.5)), tokens()
    (stage,) = model.bare_stages()
    document_BT = (torch.arange(T) >= 20).long()[None]
    seq = replace(packed(), document_BT=document_BT, position_BT=torch.where(document_BT == 0, torch.arange(T), torch.arange(T) - 20))
    monkeypatch.setattr(stage.router, "forward", lambda x, seq: torch.full_like(x[..., 0], 0.9))
    changed = row.clone()
    changed[:, 3] = (changed[:, 3] + 1) % V
    before, after = model.logits(row, seq), model.logits(changed, seq)
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.allclose(before[:, :20], after[:, :20])


def test_shares_of_the_ratio_loss_make_that_of_all_rows() -> None:
    """Two processes of unequal numbers of inner tokens, each knowing the other's counts alone."""
    p = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    parts = p.split((20, 30))
    sums = [torch.stack([q.sum(), (q > 0.5).sum(), torch.tensor(float(len(q))), torch.tensor(2.0)])[None] for q in parts]
    counts = torch.cat([sums[0][0, 1:] + sums[1][0, 1:], torch.tensor([2.0])]).detach()
    terms = [ratio_terms(s, [4.0], lambda mine: counts.clone(), weight=0.03) for s in sums]
    found = sum(t["ratio_loss_0"].total / t["ratio_loss_0"].counted for t in terms) / 2
    share = (p > 0.5).double().mean().detach()
    expected = 4 / 3 * (3 * share * p.mean() + (1 - share) * (1 - p.mean()))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, p), torch.autograd.grad(expected, p), rtol=1e-12, atol=1e-12)
    assert terms[0]["overflow_0"].total.item() == 4


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_counts_every_parameter(name: str) -> None:
    model = hnet(VARIANTS[name])
    assert HNet.cost(model.config, V, T).parameters == sum(p.numel() for p in model.parameters())


def test_flops_inside_count_once_a_chunk() -> None:
    """The toy of one stage without mixers' products by distance: 2 x the matrices a token passes, those inside / ratio."""
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
    ],
)
def test_impossible_tables(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HNetConfig.model_validate({**BASE, **ONE_STAGE, **table})


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


def low_precision() -> dict[str, Any]:
    """A step in bfloat16 on this process's row: what the parts compute in, and what comes of it."""
    table = HNetConfig.model_validate({**BASE, **ONE_STAGE, "embedding_std": 0.3})
    model, _ = divided_model(table, vocab_size=V, seq_len=T, parallelism={}, param_dtype=torch.bfloat16)
    assert isinstance(model, HNet)
    (stage,) = model.bare_stages()
    seen: dict[str, set[torch.dtype]] = {}
    parts = {
        "router": stage.router.wq,
        "residual": stage.residual.linear,
        "encoder": stage.encoder.bare_blocks[0].mixer.get_submodule("wq"),
        "main": model.main.bare_blocks[0].mixer.get_submodule("wq"),
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda part, _, out, name=name: seen.update({name: {part.weight.dtype, out.dtype}}))
    row = tokens(2)[dist.get_rank()][None]
    objective = model(row, SequenceInfo.whole(1, T, first_row=dist.get_rank()), row)
    (objective.total / (2 * T) + ratio_loss(objective, 0) / 2).backward()
    finite = [name for name, p in model.named_parameters() if p.grad is None or not shard_of(p.grad).isfinite().all()]
    ratio, counted = ratio_loss(objective, 0).detach() / 2, objective.aux["compression_0"].counted
    dist.all_reduce(ratio)
    return {"seen": seen, "not finite": finite, "ratio": ratio, "chunks": counted, "loss": objective.loss_sum / T}


def test_router_and_residual_stay_fp32_under_bfloat16_and_counts_are_of_all_rows() -> None:
    results = run_distributed(low_precision, 2)
    for found in results:
        fp32, bf16 = {torch.float32}, {torch.bfloat16}
        assert found["seen"] == {"router": fp32, "residual": fp32, "encoder": bf16, "main": bf16}
        assert found["not finite"] == []
        assert 0.5 < found["ratio"].item() < 3.0
        assert 2 < found["loss"].item() < 6
    assert results[0]["chunks"] == results[1]["chunks"]
    assert results[0]["chunks"] > 2
