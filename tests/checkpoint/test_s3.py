"""Checkpoints on S3 while the server fails and delays requests: nothing is lost."""

import json
from pathlib import Path

import pytest

from tests.checkpoint.common import assert_filled, checkpointer, filled, one_process
from tests.s3 import s3_server
from tests.train.runs import losses, train, write_config
from titanarch.config.errors import ConfigError

__all__ = ["one_process"]

SHORT = ["--validation.enable", "false", "--evaluation.enable", "false", "--lr_scheduler.kind", "constant", "--data.ledger", "true"]


@pytest.mark.usefixtures("one_process")
def test_saves_and_loads_through_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as server:
        server.failing, server.slow = 0.2, 0.1
        saver = checkpointer(tmp_path, folder="s3://bucket/run", keep_latest_k=2)
        saver.claim()
        for step in (1, 2, 3):
            saver.save(step, filled(step), config_text="")
        state = filled(0)
        loaded = saver.load(state)
        saver.close()
        assert loaded is not None
        assert (loaded.step, loaded.path, loaded.skipped) == (3, "s3://bucket/run/step-00000003", ())
        assert_filled(state, 3)
        assert server.counts["failed"] > 10
        assert server.counts["slow"] > 5


@pytest.mark.usefixtures("one_process")
def test_a_bucket_that_is_not_there_and_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch):
        saver = checkpointer(tmp_path, folder="s3://another/run")
        with pytest.raises(ConfigError, match=r"\[checkpoint\] folder: s3://another/run cannot be written .*nothing was trained"):
            saver.claim()
        saver.close()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        saver = checkpointer(tmp_path, folder="s3://bucket/run")
        with pytest.raises(ConfigError, match=r"s3://bucket/run cannot be written .*redentials.*give credentials"):
            saver.claim()
        saver.close()


def test_a_run_killed_on_a_troubled_server_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import kills

    undisturbed, killed = (write_config(tmp_path, name, tmp_path / "cache") for name in ("undisturbed", "killed"))
    overrides = [*SHORT, "--training.steps", "12", "--checkpoint.interval", "3"]
    train(undisturbed, *overrides)
    with s3_server(monkeypatch) as server:
        server.failing, server.slow = 0.2, 0.1
        remote = [*overrides, "--checkpoint.folder", "s3://bucket/killed"]
        forks = kills.start(killed, kills.Layout(), tmp_path / "killed.txt", remote)
        assert kills.wait_and_kill(forks, lambda: kills.logged_step(tmp_path / "killed") >= 8, 0.0), (tmp_path / "killed.txt").read_text()
        train(killed, *remote)
        assert server.counts["failed"] > 10
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    report = kills.check_ledger(kills.read_ledger(tmp_path / "killed"))
    assert (report.problems, report.n_lost, report.n_doubled) == ((), 0, 0)
    assert json.loads((tmp_path / "killed" / "result.json").read_text())["step"] == 12
