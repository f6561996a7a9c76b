"""Span corruption (T5, arXiv:1910.10683, section 3.1.4): spans of a row are taken out, a sentinel stands for each.

The encoder reads the row with a sentinel in the place of each span; the targets are the spans, each behind its sentinel; the decoder
reads the targets shifted by one behind a start token. Where spans lie is drawn by T5's ``random_spans_noise_mask``: a row of T tokens
has a fixed number of corrupted tokens and of spans, so that no shape depends on the draw, begins outside a span and ends inside one.

Draws are keyed by seed and row alone, so no layout of a run changes them; without a seed (evaluation) they are those of seed 0.

Documents of a packed row stay apart: each has its own sentinels from the first on and its own start token. A span that crosses the
start of a document is cut there: its tokens from there on are read nowhere and are no targets.

Shapes: B rows, T tokens, S tokens of the encoder, U targets of the decoder, N spans, M = T - 1 places between items.
"""

from bisect import bisect_right
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from titanarch.config.section import Section
from titanarch.contract.sequence import SequenceInfo
from titanarch.ops.counter_random import uniform
from titanarch.ops.cross_entropy import IGNORED

SPAN_SITE = 2
EVALUATION_SEED = 0
ENCODER_SEED_STEP = 0x5851F42D4C957F2D
"""Between the seeds of decoder and encoder, whose blocks have the same sites, so that their dropout differs."""
MOST_TOKENS = 1 << 30


class SpansConfig(Section):
    """[model.spans]: what is taken out of a row."""

    density: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="share of a row's tokens that are corrupted")
    mean_length: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(3.0, description="mean length of a span, tokens")
    n_sentinels: Annotated[int, Field(gt=0)] = Field(
        100,
        description="rows of the embedding for sentinels, at least the spans of a row; they and a start token follow the tokenizer's",
    )

    @property
    def n_rows(self) -> int:
        """Rows of the embedding beside the tokenizer's: sentinels and, last, the start token."""
        return self.n_sentinels + 1

    def counts(self, length: int) -> "SpanCounts":
        """Of a row of ``length`` tokens, at least 2."""
        assert length >= 2, f"a row of {length} tokens has no place for a span and a token outside it"
        n_noise = min(max(round(length * self.density), 1), length - 1)
        n_spans = min(max(round(n_noise / self.mean_length), 1), n_noise, length - n_noise)
        return SpanCounts(length, n_noise, n_spans)

    def longest_row(self) -> int:
        """The longest row that has a sentinel for each of its spans, tokens."""
        return 1 + bisect_right(range(2, MOST_TOKENS), self.n_sentinels, key=lambda length: self.counts(length).n_spans)


class SpanCounts(NamedTuple):
    """``length``: tokens of a row. ``n_noise``: those that are corrupted, in ``n_spans`` spans."""

    length: int
    n_noise: int
    n_spans: int

    @property
    def encoder(self) -> int:
        """Tokens that the encoder reads."""
        return self.length - self.n_noise + self.n_spans

    @property
    def decoder(self) -> int:
        """Targets of the decoder."""
        return self.n_noise + self.n_spans


class Spans(NamedTuple):
    """bool [B, T] each. ``noise``: corrupted. ``starts``: the first token of a span. ``cut``: corrupted, and of a later document
    than the first token of its span."""

    noise: Tensor
    starts: Tensor
    cut: Tensor


class Corrupted(NamedTuple):
    """What an encoder-decoder reads of rows.

    ``tokens_BS``, ``encoder``: of the encoder. ``inputs_BU``, ``decoder``: of the decoder. ``labels_BU``: its targets, -100 where there
    is none. ``place_BU``: the token of the row that each target belongs to, a sentinel's the first of its span.
    ``n_cut``: tokens that are read nowhere.
    """

    tokens_BS: Tensor
    encoder: SequenceInfo
    inputs_BU: Tensor
    decoder: SequenceInfo
    labels_BU: Tensor
    place_BU: Tensor
    n_cut: Tensor


def noise_mask(counts: SpanCounts, seed: int, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of the rows are corrupted, bool [B, T], and the number of the part that each is in, int64 [B, T]: odd in spans."""
    lengths_BN2 = torch.stack(
        [
            _random_segmentation(n_items, counts.n_spans, seed=seed, row_B=row_B, draw=draw)
            for draw, n_items in enumerate((counts.length - counts.n_noise, counts.n_noise))
        ],
        dim=2,
    )
    ends_BX = lengths_BN2.flatten(1).cumsum(1)
    index_BT = torch.arange(counts.length, device=row_B.device).expand(len(row_B), -1).contiguous()
    part_BT = torch.searchsorted(ends_BX, index_BT, right=True)
    return part_BT % 2 == 1, part_BT


def _random_segmentation(n_items: int, n_segments: int, *, seed: int, row_B: Tensor, draw: int) -> Tensor:
    """Lengths [B, N] of segments, at least 1 each, that make up the items; every way to cut is as likely as another."""
    if n_segments == 1:
        return torch.full((len(row_B), 1), n_items, device=row_B.device)
    index = torch.tensor([draw], device=row_B.device)
    draws_BM = uniform(seed=seed, row_B=row_B, index_T=index, site=SPAN_SITE, n_channels=n_items - 1)[:, 0]
    cuts_BN = draws_BM.argsort(dim=1, stable=True)[:, : n_segments - 1].sort(dim=1).values + 1
    edge = torch.zeros_like(cuts_BN[:, :1])
    return torch.diff(cuts_BN, dim=1, prepend=edge, append=edge + n_items)


def draw_spans(seq: SequenceInfo, config: SpansConfig) -> Spans:
    """The spans of the rows of ``seq``, which are whole here."""
    seed = EVALUATION_SEED if seq.seed is None else seq.seed
    noise_BT, part_BT = noise_mask(config.counts(seq.length), seed, seq.row_B)
    starts_BT = noise_BT & _begins(part_BT)
    document_of_span_BT = seq.document_BT.gather(1, _first(_begins(part_BT)))
    return Spans(noise_BT, starts_BT, noise_BT & (document_of_span_BT != seq.document_BT))


def scored(labels_BT: Tensor, seq: SequenceInfo) -> Tensor:
    """Which tokens may be targets, bool [B, T]: those that are the label of the token before; the first of a document as its second."""
    before_BT = torch.cat([labels_BT[:, :1], labels_BT[:, :-1]], dim=1)
    return torch.where(_begins(seq.document_BT), labels_BT, before_BT) != IGNORED


def count_targets(labels_BT: Tensor, seq: SequenceInfo, config: SpansConfig) -> int:
    """Valid targets of the decoder, sentinels too."""
    spans = draw_spans(seq, config)
    scored_BT = scored(labels_BT, seq) & ~spans.cut
    return int((scored_BT & spans.noise).sum() + (scored_BT & spans.starts).sum())


def corrupt(tokens_BT: Tensor, labels_BT: Tensor, seq: SequenceInfo, config: SpansConfig, vocab_size: int) -> Corrupted:
    """The rows with their spans taken out. ``labels_BT``: next tokens, -100 where there is none. ``vocab_size``: rows of the embedding."""
    spans, counts = draw_spans(seq, config), config.counts(seq.length)
    begins_BT = _begins(seq.document_BT)
    before_BT = spans.starts.cumsum(1) - spans.starts.to(torch.int64)
    sentinel_BT = vocab_size - config.n_rows + before_BT - before_BT.gather(1, _first(begins_BT))
    kept_BS = _chosen(~spans.noise | spans.starts, counts.encoder)
    read_BT = torch.where(spans.starts, sentinel_BT, tokens_BT)
    # Two places for each token: that of a sentinel before it, and its own.
    place_BU, own_BU = _both(_chosen(torch.stack([spans.starts, spans.noise], dim=2).flatten(1), counts.decoder))
    target_BU = torch.where(own_BU, tokens_BT.gather(1, place_BU), sentinel_BT.gather(1, place_BU))
    # What is cut off stands between two documents, in one of its own.
    document_BT = 2 * seq.document_BT
    document_of_span_BT = document_BT.gather(1, _first(spans.starts | ~spans.noise))
    document_BU = torch.where(spans.cut, document_of_span_BT + 1, document_BT).gather(1, place_BU)
    valid_BU = (scored(labels_BT, seq) & ~spans.cut).gather(1, place_BU)
    shifted_BU = torch.cat([target_BU[:, :1], target_BU[:, :-1]], dim=1)
    return Corrupted(
        tokens_BS=read_BT.gather(1, kept_BS),
        encoder=seq.of_documents(document_BT.gather(1, kept_BS), packed=seq.packed, seed_step=ENCODER_SEED_STEP),
        inputs_BU=torch.where(_begins(document_BU), vocab_size - 1, shifted_BU),
        decoder=seq.of_documents(document_BU, packed=seq.packed, seed_step=0),
        labels_BU=torch.where(valid_BU, target_BU, IGNORED),
        place_BU=place_BU,
        n_cut=spans.cut.sum(),
    )


def _begins(number_BT: Tensor) -> Tensor:
    """Where the number is another than before, bool [B, T]; True at the first."""
    return torch.cat([torch.ones_like(number_BT[:, :1], dtype=torch.bool), number_BT[:, 1:] != number_BT[:, :-1]], dim=1)


def _first(begins_BT: Tensor) -> Tensor:
    """Index of the latest beginning, int64 [B, T]."""
    index_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    return torch.where(begins_BT, index_T, 0).cummax(1).values


def _chosen(wanted_BT: Tensor, n: int) -> Tensor:
    """Indices in order of those that are wanted, ``n`` in each row, int64 [B, n]."""
    return (~wanted_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :n]


def _both(place_BU: Tensor) -> tuple[Tensor, Tensor]:
    """Of places counted twice a token: the token, and whether it is its own place."""
    return place_BU // 2, place_BU % 2 == 1
