import numpy as np
import pytest
import torch

from tests.data.common import content, naive_row
from titanarch.data.batch import Windows, filler, joined, make_batch


def windows(n_rows: int, length: int, *, share: float, seed: int) -> tuple[Windows, np.ndarray]:
    """Random windows, and [rows, S] whether a document begins at a token."""
    draw = np.random.default_rng(seed)
    begins = draw.random((n_rows, length + 1)) < share
    begins[:, 0] = False
    rows, columns = np.nonzero(begins)
    tokens = draw.integers(0, 1000, (n_rows, length + 1)).astype(np.uint16)
    return Windows(tokens, rows, columns, np.arange(n_rows) + 7), begins


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("n_rows", "length"), [(1, 1), (1, 9), (4, 1), (5, 33)])
def test_agrees_with_a_plain_loop(n_rows: int, length: int, share: float) -> None:
    for seed in range(5):
        given, begins = windows(n_rows, length, share=share, seed=seed)
        batch = make_batch(given)
        rows = dict(content(batch))
        segments = [b * length + t for b in range(n_rows) for t in range(length) if t == 0 or begins[b, t]]
        for b in range(n_rows):
            expected = naive_row(given.tokens_BS[b], set(np.flatnonzero(begins[b]).tolist()), 0, length)
            assert rows[7 + b] == expected
        padded = [*segments, *[n_rows * length] * (n_rows * length + 1 - len(segments))]
        assert batch.cu_seqlens.tolist() == padded
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.packed == (len(segments) > n_rows)


def test_a_start_just_past_the_row_masks_its_label_only() -> None:
    none, one = np.array([0]), np.array([4])
    batch = make_batch(Windows(np.array([[1, 2, 3, 4, 5]]), none, one, np.array([0])))
    assert batch.labels_BT.tolist() == [[2, 3, 4, -100]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 0]]
    assert not batch.packed


def test_joined_is_the_batch_of_all_rows() -> None:
    given, _ = windows(5, 12, share=0.2, seed=1)
    whole = make_batch(given)
    for cut in range(6):
        parts = []
        for rows in (slice(0, cut), slice(cut, 5)):
            inside = (given.start_row_E >= rows.start) & (given.start_row_E < rows.stop)
            parts.append(
                make_batch(
                    Windows(given.tokens_BS[rows], given.start_row_E[inside] - rows.start, given.start_column_E[inside], given.row_B[rows])
                )
            )
        both = joined(*parts)
        assert dict(content(both)) == dict(content(whole))
        assert torch.equal(both.cu_seqlens, whole.cu_seqlens)
        assert both.packed == whole.packed


def test_filler_has_no_target() -> None:
    batch = filler(3, 5)
    assert (batch.labels_BT == -100).all()
    assert batch.row_B.tolist() == [-1, -1, -1]
    assert batch.cu_seqlens.tolist() == [0, 5, 10] + [15] * 13


def test_to_moves_every_tensor() -> None:
    moved = filler(1, 2).to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
