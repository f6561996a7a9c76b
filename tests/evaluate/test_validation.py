"""The validation loss against a loop over documents."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.evaluate.common import CPU, TinyModel, data_of, loss_of, texts, two_rows
from titanarch.data.batch import filler
from titanarch.data.fixed import FixedBatches, fixed_batches
from titanarch.data.tokenizers import build_tokenizer
from titanarch.evaluate.sequence import sequence_of
from titanarch.evaluate.validation import validation_loss

T = 16


def rows_of(folder: Path, n_rows: int | None, batch_size: int) -> FixedBatches:
    data = data_of(folder, texts(3, seed=1, longest=60), texts(6, seed=2, longest=90))
    tokenizer = build_tokenizer(data.tokenizer)
    return fixed_batches(data, "validation", tokenizer=tokenizer, seq_len=T, n_rows=n_rows, batch_size=batch_size, dp_rank=0, dp_degree=1)


def naive(model: TinyModel, batches: FixedBatches) -> list[float]:
    losses = []
    for batch in batches:
        for tokens, labels, document in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), batch.document_BT.tolist(), strict=True):
            for i, label in enumerate(labels):
                if label != -100:
                    losses.append(loss_of(model, tokens[document.index(document[i]) : i + 1], label))
    return losses


@pytest.mark.parametrize("batch_size", [1, 4])
def test_is_the_mean_over_all_targets(tmp_path: Path, batch_size: int) -> None:
    model = TinyModel(257)
    batches = rows_of(tmp_path, None, batch_size)
    expected = naive(model, batches)
    model.train()
    loss, n_targets = validation_loss(model, batches, device=CPU, reduce=lambda x: x)
    assert n_targets == len(expected) > 100
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert model.training
    assert model.dropout.training


def test_keeps_each_module_in_its_mode_and_makes_no_graph(tmp_path: Path) -> None:
    model = TinyModel(257)
    model.train()
    model.layers[0].eval()
    seen: list[tuple[bool, bool]] = []

    class Spy(TinyModel):
        def token_losses(self, *args: Tensor) -> Tensor:  # type: ignore[override]
            losses = super().token_losses(*args)  # type: ignore[arg-type]
            seen.append((self.dropout.training, losses.requires_grad))
            return losses

    model.__class__ = Spy
    validation_loss(model, rows_of(tmp_path, 2, 2), device=CPU, reduce=lambda x: x)
    assert set(seen) == {(False, False)}
    assert model.dropout.training
    assert not model.layers[0].training


def test_no_target_is_not_a_number(tmp_path: Path) -> None:
    batches = rows_of(tmp_path, 1, 1)
    empty = [filler(1, T)]
    assert math.isnan(validation_loss(TinyModel(257), empty, device=CPU, reduce=lambda x: x).loss)  # type: ignore[arg-type]
    assert len(batches) == 1


def test_the_sequence_is_that_of_the_batch() -> None:
    batch = two_rows()
    seq = sequence_of(batch, seed=3)
    assert seq.position_BT is batch.position_BT
    assert seq.document_BT is batch.document_BT
    assert seq.index_T.tolist() == [0, 1, 2, 3]
    assert seq.row_B is batch.row_B
    assert (seq.length, seq.seed, seq.packed) == (4, 3, True)
    assert seq.cu_seqlens is batch.cu_seqlens
    assert torch.equal(seq.previous(batch.tokens_BT, 1), torch.tensor([[0, 5, 6, 7], [0, 1, 0, 3]]))
