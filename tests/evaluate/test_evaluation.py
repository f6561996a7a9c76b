"""All numbers of an evaluation against loops over single targets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluate.common import TRAIN_SEQ_LEN, TinyModel, data_of, loss_of, run, texts, tokens_of
from tests.evaluate.test_ngram import NaiveKneserNey
from titanarch.config.errors import ConfigError
from titanarch.data.errors import DataError
from titanarch.data.tokenizers import build_tokenizer
from titanarch.evaluate.config import EvaluationConfig, ValidationConfig, check_splits
from titanarch.evaluate.evaluation import require_readable
from titanarch.evaluate.windows import same_target_windows, whole_windows

TRAIN, VALIDATION = texts(20, seed=1, longest=200), texts(9, seed=2, longest=300)
LENGTHS = (24, 7, 64)


def config_of(**table: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"lengths": list(LENGTHS), "max_tokens": 0, "batch_tokens": 100, **table})


def row_of(rows: list[dict[str, Any]], rule: str, length: int) -> dict[str, Any]:
    (row,) = (row for row in rows if (row["rule"], row["length"]) == (rule, length))
    return row


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(TinyModel(257), config_of(), data_of(tmp_path_factory.mktemp("data"), TRAIN, VALIDATION))


@pytest.mark.parametrize("length", LENGTHS)
def test_all_positions(result: Any, tmp_path: Path, length: int) -> None:
    model, per_window = TinyModel(257), []
    for tokens in tokens_of(data_of(tmp_path, TRAIN, VALIDATION), VALIDATION):
        for start in range(0, len(tokens) - length, length):
            window = [loss_of(model, tokens[start:target], tokens[target]) for target in range(start + 1, start + length + 1)]
            per_window.append(sum(window) / length)
    row = row_of(result.rows, "all_positions", length)
    assert row["targets"] == len(per_window) * length
    assert row["loss"] == pytest.approx(np.mean(per_window), rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(per_window)), rel=1e-5)
    assert row["mean_window_perplexity"] == pytest.approx(np.mean(np.exp(per_window)), rel=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_same_targets(result: Any, tmp_path: Path, length: int) -> None:
    documents = tokens_of(data_of(tmp_path, TRAIN, VALIDATION), VALIDATION)
    model, losses, step = TinyModel(257), [], (length + 1) // 2
    for tokens in documents:
        n_blocks = max(0, len(tokens) - 1 - 32) // 32
        for first in range(33, 33 + 32 * n_blocks, 32):
            for offset in range(32):  # each target is one of the last `step` of a window that ends in the block
                end = min(first - 1 + (offset // step + 1) * step, first + 31)
                losses.append(loss_of(model, tokens[end - length : first + offset], tokens[first + offset]))
    row = row_of(result.rows, "same_targets", length)
    assert row["targets"] == len(losses)
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert "mean_window_perplexity" not in row


def test_the_same_targets_have_the_same_baselines_and_bytes(result: Any) -> None:
    rows = [row_of(result.rows, "same_targets", length) for length in LENGTHS]
    assert len({row["loss"] for row in rows}) == len(LENGTHS)
    for key in ("targets", "bytes", "unigram_loss", "bigram_loss"):
        assert len({round(row[key], 9) for row in rows}) == 1


def test_the_baselines_see_the_targets_that_the_model_sees(result: Any, tmp_path: Path) -> None:
    train = tokens_of(data_of(tmp_path, TRAIN, VALIDATION), TRAIN)
    pairs = [(a, b) for tokens in train for a, b in zip(tokens, [*tokens[1:], 256], strict=True)]  # 256 ends a document
    naive = NaiveKneserNey(pairs, 257)
    documents = tokens_of(data_of(tmp_path, TRAIN, VALIDATION), VALIDATION)
    targets = [(d, t) for d, tokens in enumerate(documents) for t in range(1, (len(tokens) - 1) // 64 * 64 + 1)]
    cache = {b: naive.unigram(b) for b in {documents[d][t] for d, t in targets}}
    row = row_of(result.rows, "all_positions", 64)
    assert row["unigram_loss"] == pytest.approx(np.mean([-math.log(cache[documents[d][t]]) for d, t in targets]), rel=1e-9)
    bigrams = {pair: naive.bigram(*pair) for pair in {(documents[d][t - 1], documents[d][t]) for d, t in targets}}
    expected = np.mean([-math.log(bigrams[documents[d][t - 1], documents[d][t]]) for d, t in targets])
    assert row["bigram_loss"] == pytest.approx(expected, rel=1e-9)


def test_bits_per_byte_of_bytes_is_the_loss_in_bits(result: Any) -> None:
    for row in result.rows:
        assert row["bytes"] == row["targets"]
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-12)


def test_bits_per_byte_of_pieces_counts_the_bytes_of_the_text(tmp_path: Path) -> None:
    data = data_of(tmp_path, TRAIN, VALIDATION, tokenizer="sentencepiece")
    (row,) = run(TinyModel(8192), config_of(lengths=[1], evaluators=["all_positions"]), data).rows
    firsts = [tokens[:1] for tokens in tokens_of(data, VALIDATION)]
    tokenizer = build_tokenizer(data.tokenizer)
    n_bytes = sum(len(text.encode()) - len(tokenizer.decode(first).encode()) for text, first in zip(VALIDATION, firsts, strict=True))
    assert row["bytes"] == n_bytes  # all but the first token of each document is a target
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["targets"] / math.log(2) / n_bytes, rel=1e-12)


def test_the_size_of_a_forward_is_bounded_and_changes_nothing(result: Any, tmp_path: Path) -> None:
    data = data_of(tmp_path, TRAIN, VALIDATION)
    for batch_tokens in (1, 64, 1000):
        model = TinyModel(257)
        other = run(model, config_of(batch_tokens=batch_tokens), data)
        assert max(rows * length for rows, length in model.forwards) <= max(batch_tokens, 64)
        assert len(set(model.forwards)) == len(LENGTHS)  # one shape a length, under both rules
        for row, expected in zip(other.rows, result.rows, strict=True):
            assert row == {**expected, **{key: pytest.approx(value, rel=1e-6) for key, value in expected.items() if key != "rule"}}


def test_a_bound_on_the_targets_chooses_among_them(tmp_path: Path) -> None:
    data, model = data_of(tmp_path, TRAIN, VALIDATION), TinyModel(257)
    rows = run(model, config_of(max_tokens=200, lengths=[64, 16]), data).rows
    lengths_N = np.array([len(tokens) for tokens in tokens_of(data, VALIDATION)])
    assert [(row["rule"], row["length"], row["targets"]) for row in rows] == [
        ("all_positions", 64, 192),
        ("all_positions", 16, 192),
        ("same_targets", 64, 192),
        ("same_targets", 16, 192),
    ]
    assert len(whole_windows(lengths_N, 16, 200)) == 12
    assert len(same_target_windows(lengths_N, 16, 64, 200)) == 24
    assert max(rows * length for rows, length in model.forwards) <= 200  # not padded to batch_tokens


def test_without_lengths_the_training_length_is_measured(tmp_path: Path) -> None:
    rows = run(TinyModel(257), config_of(lengths=[], baselines=False), data_of(tmp_path, TRAIN, VALIDATION)).rows
    assert {row["length"] for row in rows} == {TRAIN_SEQ_LEN}
    assert not any(key.endswith("gram_loss") for row in rows for key in row)


def test_what_cannot_be_measured_is_a_row_that_says_why(result: Any, tmp_path: Path) -> None:
    data, model = data_of(tmp_path, TRAIN, VALIDATION), TinyModel(257, longest=30)
    short = run(model, config_of(lengths=[*LENGTHS, 10_000]), data)
    for rule in ("all_positions", "same_targets"):
        assert row_of(short.rows, rule, 64) == {"rule": rule, "length": 64, "note": "skipped: the model reads at most 30 tokens"}
        assert row_of(short.rows, rule, 10_000)["note"].startswith("skipped: the model reads")
        assert row_of(short.rows, rule, 24) == row_of(result.rows, rule, 24)  # 64 decides the targets all the same
    long = run(TinyModel(257), config_of(lengths=[24, 10_000]), data)
    note = "skipped: no validation document has more than 10000 tokens"
    assert row_of(long.rows, "same_targets", 10_000) == {"rule": "same_targets", "length": 10_000, "note": note}
    assert {row["length"] for row in long.tables["position_scores"]} == {24}
    none = run(TinyModel(257, longest=3), config_of(), data)
    assert none.tables["position_scores"] == ({"score": "all", "length": 7, "note": "skipped: the model reads at most 3 tokens"},)


def test_asking_for_an_unreadable_length_is_an_error() -> None:
    require_readable(TinyModel(257), (10**6,))
    require_readable(TinyModel(257, longest=64), (64, 3))
    with pytest.raises(ConfigError, match="65, 100: the model's position table has 64 rows"):
        require_readable(TinyModel(257, longest=64), (65, 3, 100))


def test_a_tokenizer_without_bytes_gives_no_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: object) -> np.ndarray:
        raise DataError("bytes a token are not known")

    monkeypatch.setattr("titanarch.data.tokenizers.BytesTokenizer._byte_table", refuse)
    (row,) = run(TinyModel(257), config_of(lengths=[7], evaluators=["all_positions"]), data_of(tmp_path, TRAIN, VALIDATION)).rows
    assert "bits_per_byte" not in row
    assert "bytes" not in row
    assert "no bits per byte: bytes a token are not known" in caplog.text


def test_the_result_is_plain(result: Any) -> None:
    plain = result.to_json()
    assert list(plain) == ["data_fingerprint", "context_lengths", "loss_by_position", "position_scores"]
    assert plain["context_lengths"] == result.rows
    assert all(type(value) in (str, int, float) for name in result.tables for row in plain[name] for value in row.values())


def test_the_defaults_and_what_is_refused() -> None:
    assert [component.kind for component in EvaluationConfig().evaluators] == ["all_positions", "same_targets", "positions"]
    with pytest.raises(ValueError, match="a length is given twice"):
        EvaluationConfig.model_validate({"lengths": [3, 3]})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        EvaluationConfig.model_validate({"lengths": [0]})
    assert not EvaluationConfig.is_identity("lengths")
    assert not ValidationConfig.is_identity("interval")


def test_data_that_hold_nothing_out_are_refused_before_launch(tmp_path: Path) -> None:
    data = data_of(tmp_path, TRAIN, VALIDATION)
    check_splits(data, validation=ValidationConfig(), evaluation=EvaluationConfig())
    bare = data.model_copy(update={"validation": None})
    with pytest.raises(ConfigError) as caught:
        check_splits(bare, validation=ValidationConfig(), evaluation=EvaluationConfig())
    assert [problem.key for problem in caught.value.problems] == ["validation.enable", "evaluation.enable"]
    check_splits(bare, validation=ValidationConfig(enable=False), evaluation=EvaluationConfig(enable=False))
