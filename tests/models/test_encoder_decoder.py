"""The encoder-decoder: T5's noise mask, a loop over tokens, documents, layouts, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.models.encoder_decoder_oracle import (
    D,
    H,
    T,
    V,
    built,
    config_of,
    corrupted_by_a_loop,
    noise_mask,
    rows,
)
from tests.models.materialize import materialized
from tests.parallel.divided import divided_model
from titanarch.config.errors import ConfigError
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.data.batch import IGNORED
from titanarch.models.encoder_decoder import spans as spanning
from titanarch.models.encoder_decoder.attention import BidirectionalAttention
from titanarch.models.encoder_decoder.model import EncoderDecoder
from titanarch.models.encoder_decoder.spans import SpansConfig, draw_spans
from titanarch.models.mixers.attention import Attention
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.mesh import Degrees

PACKED = (3, 20, 1, 25, 15)
ROW_WITH_SPANS_IN_BOTH = 1


@pytest.mark.parametrize(("length", "density", "mean"), [(64, 0.15, 3.0), (256, 0.15, 3.0), (50, 0.4, 1.5), (8, 0.15, 3.0)])
def test_the_noise_mask_is_distributed_as_t5s(length: int, density: float, mean: float) -> None:
    config, n_rows, generator = SpansConfig(density=density, mean_length=mean), 4000, np.random.default_rng(0)
    seq = replace(SequenceInfo.whole(n_rows, length, seed=3), row_B=torch.arange(n_rows) * 7)
    mine = draw_spans(seq, config).noise
    its = torch.from_numpy(np.stack([noise_mask(length, density, mean, generator) for _ in range(n_rows)]))
    for mask in (mine, its):
        assert not mask[:, 0].any()
        assert mask[:, -1].all()
    assert torch.equal(mine.sum(1), its.sum(1))
    starts = [(mask[:, 1:] & ~mask[:, :-1]).double() for mask in (mine, its)]
    assert torch.equal(starts[0].sum(1), starts[1].sum(1))
    # Shares of rows at each place, and of neighbours corrupted alike: five standard deviations of their difference.
    bound = 5 * (0.5 / n_rows) ** 0.5
    torch.testing.assert_close(mine.double().mean(0), its.double().mean(0), rtol=0, atol=bound)
    torch.testing.assert_close(starts[0].mean(0), starts[1].mean(0), rtol=0, atol=bound)
    n_masks = [len({tuple(row.tolist()) for row in mask}) for mask in (mine, its)]
    assert n_masks[0] >= 0.9 * n_masks[1]


@pytest.mark.parametrize("lengths", [(T,), PACKED], ids=["one document", "packed"])
def test_corruption_equals_a_loop_over_tokens(lengths: tuple[int, ...]) -> None:
    model, n_cut, n_targets = built(), 0, 0
    tokens, seq = rows(40, lengths=lengths, seed=11)
    found, noise = model._corrupted(tokens, seq, tokens), draw_spans(seq, model.config.spans).noise
    for row in range(len(tokens)):
        expected = corrupted_by_a_loop(tokens[row].tolist(), noise[row].tolist(), seq.document_BT[row].tolist())
        assert found.tokens_BS[row].tolist() == expected["encoder"]
        assert (found.encoder.document_BT[row] // 2).tolist() == expected["encoder documents"]
        assert found.labels_BU[row].tolist() == expected["labels"]
        assert found.place_BU[row].tolist() == expected["places"]
        documents, inputs = found.decoder.document_BT[row].tolist(), found.inputs_BU[row].tolist()
        for number, document in enumerate(expected["documents"]):
            if document is None:
                assert documents[number] % 2 == 1
                n_cut += 1
            else:
                assert (documents[number], inputs[number]) == (2 * document, expected["inputs"][number])
        n_targets += sum(label != IGNORED for label in expected["labels"])
        assert found.decoder.document_BT[row].diff().min() >= 0
    assert int(found.n_cut) == n_cut
    assert (n_cut > 0) == (len(lengths) > 1)
    objective = model(tokens, seq, tokens)
    cut = objective.aux["cut_targets"]
    assert (int(cut.total), int(cut.counted), cut.weight) == (n_cut, 40 * 10, 0.0)
    assert int(objective.n_targets) == n_targets == model.count_targets(tokens, seq)


def test_spans_depend_on_seed_and_row_alone() -> None:
    model = built()
    tokens, seq = rows(4, seed=3)
    whole = model._corrupted(tokens, seq, tokens)
    last = replace(seq, row_B=seq.row_B[3:], position_BT=seq.position_BT[3:], document_BT=seq.document_BT[3:])
    assert torch.equal(model._corrupted(tokens[3:], last, tokens[3:]).tokens_BS, whole.tokens_BS[3:])
    again = model._corrupted(tokens, replace(seq, seed=4), tokens)
    assert (again.tokens_BS != whole.tokens_BS).any(1).all()
    unseeded, zero = (draw_spans(replace(seq, seed=seed), model.config.spans).noise for seed in (None, spanning.EVALUATION_SEED))
    assert torch.equal(unseeded, zero)


def test_a_document_depends_on_its_own_tokens_alone() -> None:
    model, (tokens, seq) = built(), rows(6, lengths=PACKED)
    with torch.no_grad():
        before = model.token_losses(tokens, seq, tokens)
        for number in range(len(PACKED)):
            changed = torch.where(seq.document_BT == number, (tokens + 1) % 80, tokens)
            after = model.token_losses(changed, seq, changed)
            differs = (before != after).any(0)
            assert differs.any() or number in (0, 2)
            assert (seq.document_BT[0][differs] == number).all()


def test_documents_of_a_row_equal_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their spans are given, since rows of other lengths draw others."""
    model, (tokens, seq) = built(), rows(1, lengths=(24, 40))
    # A row with a span in each document, and none across both.
    seq = replace(seq, row_B=torch.tensor([ROW_WITH_SPANS_IN_BOTH]))
    spans = draw_spans(seq, model.config.spans)
    assert not spans.cut.any()
    together = model.token_losses(tokens, seq, tokens)
    for start, end in ((0, 24), (24, 64)):
        part = spanning.Spans(*(mask[:, start:end] for mask in spans))
        n_noise, n_spans = int(part.noise.sum()), int(part.starts.sum())
        assert n_spans > 0
        counts = spanning.SpanCounts(end - start, n_noise, n_spans)
        monkeypatch.setattr(spanning, "draw_spans", lambda seq, config, part=part: part)
        monkeypatch.setattr(SpansConfig, "counts", lambda self, length, counts=counts: counts)
        alone = model.token_losses(tokens[:, start:end], SequenceInfo.whole(1, end - start), tokens[:, start:end])
        torch.testing.assert_close(alone, together[:, start:end], rtol=1e-10, atol=1e-10)
        assert int((alone > 0).sum()) == n_noise


def test_losses_lie_at_corrupted_tokens_and_add_up() -> None:
    model, (tokens, seq) = built(), rows(3, lengths=PACKED)
    labels = torch.where(torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.3, IGNORED, tokens)
    losses, spans = model.token_losses(tokens, seq, labels), draw_spans(seq, model.config.spans)
    place = torch.arange(T)
    is_first = torch.tensor([i == 0 or seq.document_BT[0, i] != seq.document_BT[0, i - 1] for i in range(T)])
    scored = labels[:, torch.where(is_first, place, place - 1)] != IGNORED
    assert torch.equal(losses > 0, spans.noise & ~spans.cut & scored)
    objective = model(tokens, seq, labels)
    torch.testing.assert_close(losses.sum(), objective.loss_sum.to(losses.dtype), rtol=1e-10, atol=1e-10)
    assert int(objective.n_targets) == model.count_targets(labels, seq) == int((losses > 0).sum() + (spans.starts & scored).sum())
    assert model.count_targets(torch.full_like(labels, IGNORED), seq) == 0


def test_the_decoder_reads_earlier_targets_alone() -> None:
    model, (tokens, seq) = built(), rows(2)
    found = model._corrupted(tokens, seq, tokens)
    inputs = found.inputs_BU.clone()
    inputs[:, 6] = (inputs[:, 6] + 1) % 80
    with torch.no_grad():
        before, after = (model._restored(f)[0] for f in (found, found._replace(inputs_BU=inputs)))
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-12, atol=1e-12)
    assert ((before - after)[:, 6:].abs().amax(2) > 1e-9).all()
    read = found.tokens_BS.clone()
    read[:, -1] = 1
    with torch.no_grad():
        changed, _ = model._encoded(read, found.encoder)
        encoded, _ = model._encoded(found.tokens_BS, found.encoder)
    assert ((changed - encoded).abs().amax(2) > 1e-9).all(), "a token of the encoder sees those after it"


VARIANTS: dict[str, dict[str, Any]] = {
    "rotary, across too; grouped, normed, gated, with sinks": {
        "position": {"relative": "rotary"},
        "mixers": {
            "attention": {"n_kv_heads": 2, "qk_norm": True, "output_gate": True, "sinks": True, "value_residual": "learned"},
            "cross": {"position": "rotary"},
        },
        "residual": "sandwich",
        "scale_head": False,
        "tied_head": False,
    },
    "post-norm, learned positions, SwiGLU, windows in the encoder": {
        "position": {"absolute": "learned", "relative": "linear_cpb"},
        "mixers": {"encoder": {"window": 5}},
        "residual": "post_norm",
        "channel": {"kind": "swiglu", "d_ff": 40},
        "init": {"scheme": "gpt2"},
    },
    "a recurrent decoder": {"layers": ["mamba2", "attention"], "residual": "no_mixer_residual"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_cost_what_they_have_and_keep_documents_apart(name: str) -> None:
    model, (tokens, seq) = built(**VARIANTS[name]), rows(2, lengths=(40, 24), seed=1)
    assert EncoderDecoder.cost(model.config, V, T).parameters == sum(p.numel() for p in model.parameters())
    model(tokens, seq, tokens).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if n != "position.table.weight")
    other = torch.where(seq.document_BT == 0, (tokens + 1) % 80, tokens)
    before, after = (model.token_losses(x, seq, x) for x in (tokens, other))
    torch.testing.assert_close(before[:, 40:], after[:, 40:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, :40], after[:, :40])


def test_long_rows_take_the_blockwise_kernels() -> None:
    """2**14 logits and more go another way than small ones; the definition of attention is the same."""
    config = config_of(spans={"n_sentinels": 20})
    model = materialized(lambda: EncoderDecoder(config, V, 320), scheme="fan_in").double()
    tokens = torch.randint(80, (1, 320), generator=torch.Generator().manual_seed(1))
    seq = replace(SequenceInfo.whole(1, 320), document_BT=(torch.arange(320) >= 150).long()[None], packed=True)
    found = model._corrupted(tokens, seq, tokens)
    block, both_ways = model.bare_decoder[0], model.bare_encoder[0].mixer
    assert isinstance(both_ways, BidirectionalAttention)
    S, U = found.tokens_BS.shape[1], found.labels_BU.shape[1]
    x_BSD, x_BUD = (torch.randn(1, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (S, U))
    mine, _ = both_ways.run(x_BSD, found.encoder, Carry.empty())
    table_HN, _ = both_ways.relative_positions()[0](S, True, Carry.empty())
    index_S = torch.arange(S)
    bias_HSS = table_HN.double()[:, index_S[:, None] - index_S + S - 1]
    document_S, document_U = found.encoder.document_BT[0], found.decoder.document_BT[0]
    torch.testing.assert_close(mine, dense(both_ways, x_BSD, x_BSD, bias_HSS, document_S, document_S), rtol=1e-9, atol=1e-9)
    across, _ = block.cross.run(x_BUD, found.decoder, Carry(model._memory(x_BSD, found.encoder), {}))
    torch.testing.assert_close(across, dense(block.cross, x_BUD, x_BSD, torch.zeros(1), document_U, document_S), rtol=1e-9, atol=1e-9)


def dense(mixer: Attention, x_BUD: Tensor, y_BSD: Tensor, bias: Tensor, query_document_U: Tensor, document_S: Tensor) -> Tensor:
    """Attention of x to y inside documents, by a mask of all pairs, unscaled."""
    q, k, v = (linear(x).unflatten(-1, (H, -1)).transpose(1, 2) for linear, x in ((mixer.wq, x_BUD), (mixer.wk, y_BSD), (mixer.wv, y_BSD)))
    logits = q @ k.mT + bias.double()
    p = logits.masked_fill(query_document_U[:, None] != document_S, -torch.inf).softmax(-1).nan_to_num(0.0)
    out: Tensor = mixer.wo((p @ v).transpose(1, 2).flatten(2))
    return out


LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP2": {"parallelism": {}},
    "TP2": {"parallelism": {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}},
    "TP2, no loss parallelism": {
        "parallelism": {"tensor_parallel_degree": 2, "enable_sequence_parallel": False, "enable_loss_parallel": False}
    },
    "FSDP2, AC full": {"parallelism": {}, "activation_checkpoint": {"mode": "full"}},
}
DROPPING = {"dropout": 0.1, "mixers": {"attention": {"scale": 1.0, "dropout": 0.1}}}


def divided() -> dict[str, dict[str, Tensor]]:
    """Of every layout: losses of the rows, and gradients of the mean loss by name, whole."""
    found = {}
    for name, options in {"one": {"parallelism": {"data_parallel_replicate_degree": 2}}, **LAYOUTS}.items():
        model, mesh = divided_model(config_of(**DROPPING), vocab_size=V, seq_len=T, **options)
        n_shares = mesh.degrees.data_parallel
        tokens, seq = rows(4, lengths=PACKED, seed=5)
        count, first = model.count_targets(tokens, seq), mesh.data_rank * 4 // n_shares
        own = slice(first, first + 4 // n_shares)
        part = replace(seq, position_BT=seq.position_BT[own], document_BT=seq.document_BT[own], row_B=seq.row_B[own])
        objective = model(tokens[own], part, tokens[own])
        (objective.total / count).backward()
        loss = objective.loss_sum.clone()
        dist.all_reduce(loss)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items() if g is not None}
        found[name] = {"loss": loss / count, **whole}
    return found


def test_layouts_give_the_same_loss_and_gradients() -> None:
    """With dropout; the first is a copy of the model on each process."""
    for results in run_distributed(divided, 2):
        expected = results.pop("one")
        for name, found in results.items():
            assert found.keys() == expected.keys()
            for part, value in expected.items():
                worst = (found[part] - value).abs().max() / value.abs().max()
                assert worst < 2e-5, f"{name}: {part} is off by {worst:.1e}"


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    def why(**keys: Any) -> str:
        with pytest.raises(ValidationError) as caught:
            config_of(**keys)
        return str(caught.value)

    assert "follows the decoder's own" in why(residual="parallel")
    assert "'encoder' is not causal" in why(layers=["encoder"])
    assert "use attention" in why(mixers={"encoder": "mamba2"})
    assert "t5 is a bias by distance" in why(mixers={"cross": {"position": "t5"}})
    assert "has no window" in why(mixers={"cross": {"window": 4}})
    assert "no value_residual" in why(mixers={"cross": {"value_residual": "half"}})
    assert "values of block 0" in why(layers=["gla", "attention"], mixers={"attention": {"value_residual": "half"}})
    with pytest.raises(ConfigError, match="10 are fewer than the 26 spans of a row of 512 tokens"):
        EncoderDecoder(config_of(), V, 512)
    model = built()
    longest = model.max_length()
    assert longest is not None
    assert (model.config.spans.counts(longest).n_spans, model.config.spans.counts(longest + 1).n_spans) == (10, 11)
    with pytest.raises(ConfigError, match="longer than the"):
        model.logits(torch.zeros(1, longest + 1, dtype=torch.int64), SequenceInfo.whole(1, longest + 1))
    with pytest.raises(ConfigError, match="cannot decode a token at a time"):
        model.initial_state(1)
    for key, value in (("context_parallel_degree", 2), ("tensor_parallel_degree", 2)):
        degrees = Degrees(1, 1, 2, 1) if key.startswith("context") else Degrees(1, 1, 1, 2)
        with pytest.raises(ConfigError, match="EncoderDecoder cannot be divided"):
            decide_division(model, ParallelismConfig.model_validate({key: value}), degrees, seq_len=T, device_type="cpu")
