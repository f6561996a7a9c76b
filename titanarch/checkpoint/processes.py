"""What the processes of a run agree on about their checkpoints, over a gloo group."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from titanarch.checkpoint.errors import CheckpointError
from titanarch.config.errors import ConfigError

T = TypeVar("T")


class Processes:
    """All processes of the run, or this one alone where ``torch.distributed`` is not initialized.

    Making one is collective. Each has a gloo group of its own, so that a background upload never shares a group
    with the training thread; a group is used by one thread at a time.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.distributed = dist.is_initialized()
        self.group = dist.new_group(backend="gloo", timeout=timeout) if self.distributed else None
        self.rank = dist.get_rank() if self.distributed else 0
        self.count = dist.get_world_size() if self.distributed else 1

    def from_first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on process 0, on all processes; what it raises there, all raise."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (ConfigError, CheckpointError) as error:
                outcome[1] = error
            except (OSError, ValueError) as error:
                outcome[1] = CheckpointError(f"process 0: {type(error).__name__}: {error}")
                outcome[1].__cause__ = error
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank, on all."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def merge(self, local: Mapping[str, Any]) -> dict[str, Any]:
        """The union of each process's dict, the same on all, so that it loads on any number of processes.

        Args:
            local: what this process knows, keyed by something global: the number of a data stream, never a rank.

        Raises:
            CheckpointError: processes give different values for one key.
        """
        merged: dict[str, Any] = {}
        owner: dict[str, int] = {}
        for rank, part in enumerate(self.gather(dict(local))):
            for key, value in part.items():
                if key in merged and merged[key] != value:
                    raise CheckpointError(f"processes {owner[key]} and {rank} hold different state for '{key}'; it must have one owner")
                merged.setdefault(key, value)
                owner.setdefault(key, rank)
        return {key: merged[key] for key in sorted(merged)}
