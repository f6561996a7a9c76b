"""A run is its directory: who may write there, what is kept in it, and what is put right before a run goes on.

::

    run.lock               who is running it now
    identity.json          the identity keys of the configuration, by dotted key
    config.toml            the resolved configuration of the latest start
    configs/start-1.toml   the resolved configuration of each start, and
    configs/start-1.json   its versions, device and commit
    metrics.jsonl          one object a logged step; metrics.discarded.jsonl: rows of steps that were run again
    checkpoints/           one folder a checkpoint
    reports/               one file a step whose gradient was bad
    ledger/                which rows each step was fed, where data.ledger is on
    hangs/                 stacks of processes in a step that hung; heartbeat.json: the last step done
    result.json            only of a finished run; result.previous.json: of an end that training went on from

Only process 0 starts a folder; what stands above training reads these files and nothing else.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from titanarch.config.errors import ConfigError, Problem, shown
from titanarch.train.metrics.files import atomic_write, json_ready, read_json, write_json, writing
from titanarch.train.metrics.jsonl import METRICS_FILE
from titanarch.train.metrics.rows import Trimmed, trim_rows
from titanarch.train.run_lock import RunLock

_ABSENT = object()


class RunFolder:
    """The paths and files of a run. ``RunFolder(path)`` reads; ``RunFolder.start`` also locks it, to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / METRICS_FILE
        self.discarded_path = path / "metrics.discarded.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.config_path = path / "config.toml"
        self.configs_path = path / "configs"
        self.identity_path = path / "identity.json"
        self.result_path = path / "result.json"
        self.previous_result_path = path / "result.previous.json"
        self.start_number = 0
        """Which start of the run this is, from 1; 0 when only read."""
        self._lock: RunLock | None = None

    @classmethod
    def start(
        cls,
        path: Path,
        *,
        identity: Mapping[str, Any],
        config_toml: str,
        environment: Mapping[str, Any],
        allowed: Collection[str] = (),
    ) -> "RunFolder":
        """Create or reopen a run folder, locked, on process 0.

        ``identity``: the identity keys (dotted) and values of the configuration; ``config_toml``: the resolved
        configuration; ``environment``: from ``environment_record``; ``allowed``: identity keys that may differ from
        the folder's (``training.steps`` where the schedule does not depend on it); the new value is then kept.

        Raises ConfigError, before anything is written but the lock, when the path cannot be a folder, another live
        process runs in it, or it holds a run with other identity keys, all of which are listed.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(Problem(f"{path} is, or lies under, a file; choose another folder", key="job.dump_folder")) from error
        except OSError as error:
            raise ConfigError(Problem(f"{path} cannot be made: {error.strerror}; choose another", key="job.dump_folder")) from error
        folder._lock = RunLock(path / "run.lock")
        try:
            folder._check_identity(identity, allowed)
            folder._record_start(identity, config_toml, environment)
        except BaseException:
            folder.close()
            raise
        return folder

    @property
    def is_resume(self) -> bool:
        """Whether the folder had been started before."""
        return self.start_number > 1

    def resume_at(self, step: int) -> Trimmed:
        """Put the metrics right for training on from ``step`` (0: from the beginning); call before the sinks open.

        Rows of later steps move to ``metrics.discarded.jsonl``; a torn last line is dropped.
        """
        return trim_rows(self.metrics_path, self.discarded_path, step=step)

    def set_aside_result(self) -> bool:
        """Training goes on past an earlier end: its result no longer is the run's. Returns whether there was one."""
        if not self.result_path.exists():
            return False
        with writing(self.previous_result_path):
            os.replace(self.result_path, self.previous_result_path)
        return True

    def write_result(self, result: Mapping[str, Any]) -> None:
        """``result.json``, in one step; its presence says that the run has finished."""
        write_json(self.result_path, result)

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, None of any other. Raises ConfigError when the file is damaged."""
        return read_json(self.result_path) if self.result_path.exists() else None

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_identity(self, identity: Mapping[str, Any], allowed: Collection[str]) -> None:
        if not self.identity_path.exists():
            foreign = [p.name for p in (self.config_path, self.metrics_path, self.checkpoints_path) if p.exists()]
            if foreign:
                message = (
                    f"{self.path} holds {', '.join(foreign)} but no {self.identity_path.name}, "
                    "so it is no run that can go on; choose another folder"
                )
                raise ConfigError(Problem(message, key="job.dump_folder"))
            return
        if not self._has_progress():
            return  # an earlier start failed before its first row, for want of its data say: nothing is lost
        saved = read_json(self.identity_path)
        new = json.loads(json.dumps(json_ready(identity)))
        problems = [
            Problem(f"is {_shown(new, key)} here, but {_shown(saved, key)} in the run", key=key)
            for key in sorted(saved.keys() | new.keys())
            if key not in allowed and saved.get(key, _ABSENT) != new.get(key, _ABSENT)
        ]
        if problems:
            message = f"{self.path} holds a run with another configuration; choose another folder, or take back what is listed below"
            raise ConfigError(Problem(message, key="job.dump_folder"), *problems)

    def _has_progress(self) -> bool:
        """Whether a row was logged or a checkpoint saved."""
        has_rows = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        return has_rows or (self.checkpoints_path.is_dir() and any(self.checkpoints_path.iterdir()))

    def _record_start(self, identity: Mapping[str, Any], config_toml: str, environment: Mapping[str, Any]) -> None:
        """identity.json comes first: without it a folder with anything else of a run is refused."""
        write_json(self.identity_path, identity)
        with writing(self.configs_path):
            self.configs_path.mkdir(exist_ok=True)
        starts = [re.fullmatch(r"start-(\d+)\.toml", path.name) for path in self.configs_path.iterdir()]
        self.start_number = max((int(start[1]) for start in starts if start), default=0) + 1
        atomic_write(self.config_path, config_toml)
        write_json(self.configs_path / f"start-{self.start_number}.json", environment)
        atomic_write(self.configs_path / f"start-{self.start_number}.toml", config_toml)


def _shown(table: Mapping[str, Any], key: str) -> str:
    return shown(table[key]) if key in table else "absent"
