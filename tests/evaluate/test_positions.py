"""Loss by position, the ICL score and the slope, on losses that are known."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tests.evaluate.common import TRAIN_SEQ_LEN, TinyModel, data_of, run
from titanarch.contract.sequence import SequenceInfo
from titanarch.evaluate.config import EvaluationConfig
from titanarch.evaluate.positions import bootstrap, icl_weights, log_edges, slope_weights

LENGTH = 600


class KnownLosses(TinyModel):
    """At position p: 5 up to 99, 3 up to the training length + 500, and a line of slope 0.002 everywhere; + 1 in rows of 'b'."""

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        position_BT = seq.position_BT.float()
        losses_BT = 3 + 2 * (position_BT < 100) + 0.002 * position_BT + (tokens_BT == ord("b"))
        return losses_BT.masked_fill(labels_BT == -100, 0)


def test_of_a_model_whose_losses_are_known(tmp_path: Path) -> None:
    data = data_of(tmp_path, ["ab" * 40], ["a" * 1900, "b" * 700, "a" * 20])  # 3 windows, 1 window, none
    config = EvaluationConfig.model_validate({"lengths": [32, LENGTH], "max_tokens": 0, "evaluators": ["positions"]})
    tables = run(KnownLosses(257), config, data).tables
    icl, slope = tables["position_scores"]
    assert (icl["score"], icl["length"], slope["score"]) == ("icl_score", LENGTH, "extrapolation_slope")
    assert icl["value"] == pytest.approx(3 + 0.002 * 500 - (5 + 0.002 * 50), abs=1e-6)
    position = np.arange(TRAIN_SEQ_LEN, LENGTH)
    fitted = np.polyfit(position, 3 + 2 * (position < 100) + 0.002 * position, 1)[0]
    assert slope["value"] == pytest.approx(1000 * fitted, abs=1e-5)  # nats a 1,000 tokens
    bins = tables["loss_by_position"]
    assert (bins[0]["first"], bins[-1]["last"]) == (0, LENGTH - 1)
    for row in bins:
        here = np.arange(int(row["first"]), int(row["last"]) + 1)
        assert row["loss"] == pytest.approx(np.mean(3 + 2 * (here < 100) + 0.002 * here) + 0.25, abs=1e-5)
        assert row["count"] == 4 * len(here)
        # two documents: drawing the same one twice gives the ends, one of each what was seen
        assert row["low_95"] == pytest.approx(row["loss"] - 0.25, abs=1e-5)
        assert row["high_95"] == pytest.approx(row["loss"] + 0.75, abs=1e-5)


def test_short_contexts_have_no_scores_and_one_document_no_interval(tmp_path: Path) -> None:
    data = data_of(tmp_path, ["ab" * 40], ["a" * 100])
    config = EvaluationConfig.model_validate({"lengths": [TRAIN_SEQ_LEN], "evaluators": ["positions"]})
    tables = run(KnownLosses(257), config, data).tables
    assert [row["note"] for row in tables["position_scores"]] == [
        "skipped: needs a context of 512 tokens",
        f"skipped: needs a context longer than the {TRAIN_SEQ_LEN} tokens of training",
    ]
    assert "low_95" not in tables["loss_by_position"][0]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 128, 1000])
@pytest.mark.parametrize("per_octave", [1, 2, 4])
def test_bins_cover_every_position_once_and_grow(length: int, per_octave: int) -> None:
    edges = log_edges(length, per_octave)
    assert [p for first, end in edges for p in range(first, end)] == list(range(length))
    sizes = [end - first for first, end in edges]
    assert all(end <= 2 ** (1 / per_octave) * first + 1 for first, end in edges[1:])
    assert len(sizes) <= 1 + per_octave * np.log2(length) + 1


def test_weights_are_the_statistics() -> None:
    losses_T = np.random.default_rng(0).normal(size=700)
    icl, slope = icl_weights(700), slope_weights(128, 700)
    assert not isinstance(icl, str)
    assert not isinstance(slope, str)
    assert losses_T @ icl == pytest.approx(losses_T[490:511].mean() - losses_T[40:61].mean())
    assert losses_T @ slope == pytest.approx(1000 * np.polyfit(np.arange(128, 700), losses_T[128:], 1)[0])
    assert isinstance(icl_weights(511), str)
    assert isinstance(slope_weights(128, 129), str)
    assert not isinstance(slope_weights(128, 130), str)


def test_the_bootstrap_has_the_error_of_the_mean_of_documents() -> None:
    draw = np.random.default_rng(1)
    document_W = np.repeat(np.arange(400) * 3, 2)  # numbers of documents need not be dense
    value_N = draw.normal(size=400)
    bounds = bootstrap(np.repeat(value_N, 2)[:, None], document_W, 4000)
    assert bounds is not None
    half = 1.96 * value_N.std() / 400**0.5
    np.testing.assert_allclose([bounds[0][0], bounds[1][0]], [value_N.mean() - half, value_N.mean() + half], atol=0.1 * half)
