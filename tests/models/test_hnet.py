"""H-Net: a loop over tokens and documents, causality, packing, capacity, decoding, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.distributed import run_distributed
from tests.models.hnet_oracle import BASE, LENGTHS, ONE_STAGE, TWO_STAGES, VARIANTS, Oracle, T, V, hnet, packed, tokens
from tests.parallel.divided import divided_model
from titanarch.contract.model import Objective
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.hnet import chunks as chunking
from titanarch.models.hnet.config import HNetConfig
from titanarch.models.hnet.model import HNet
from titanarch.models.hnet.ratio import ratio_terms
from titanarch.models.hnet.stage import Stack
from titanarch.train.local_optimizers import shard_of


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


def loss_of(model: HNet, seq: SequenceInfo) -> Tensor:
    """With the ratio losses, weighed so that they count."""
    row = tokens()
    objective = model(row, seq, row.roll(-1, 1))
    return objective.total + sum(7.0 * ratio_loss(objective, number) for number in range(len(model.stages)))


def test_with_fewer_slots_it_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body is one graph, with the eager losses and gradients."""
    model, seq = hnet(with_capacity(ONE_STAGE, 0.5)), packed()
    eager = {"loss": loss_of(model, seq), **gradients(model, loss_of(model, seq))}
    torch._dynamo.reset()
    monkeypatch.setattr(model, "body", torch.compile(model.body, backend="aot_eager", fullgraph=True, dynamic=False))
    torch.testing.assert_close({"loss": loss_of(model, seq), **gradients(model, loss_of(model, seq))}, eager, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_number_comes_to_the_host(name: str) -> None:
    """Forward and backward run on tensors that have no data."""
    model, seq = hnet(VARIANTS[name]), packed()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert gradients(model, loss_of(model, seq)).keys() == dict(model.named_parameters()).keys()


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
