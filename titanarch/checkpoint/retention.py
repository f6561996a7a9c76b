"""Which checkpoints are kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from titanarch.checkpoint.config import CheckpointConfig
from titanarch.checkpoint.marker import Marker


@dataclass(frozen=True)
class Retention:
    """A checkpoint is kept for any of three reasons. By default all are.

    ``latest_k``: it is one of so many committed last; 0: all are kept. ``every_n_steps``: this divides its step; 0: for no
    step. ``best_k``: it has one of so many lowest validation losses.
    """

    latest_k: int = 0
    every_n_steps: int = 0
    best_k: int = 0

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        """What a section says."""
        return cls(config.keep_latest_k, config.keep_every_n_steps, config.keep_best_k)


def superfluous(committed: Sequence[tuple[str, Marker]], retention: Retention) -> list[str]:
    """Folders to remove, the oldest first. ``committed``: all, oldest first. Of equal losses the older is the better."""
    if retention.latest_k == 0:
        return []
    measured = [(marker.validation_loss, folder) for folder, marker in committed if marker.validation_loss is not None]
    best = {folder for _, folder in sorted(measured, key=lambda item: item[0])[: retention.best_k]}
    every = retention.every_n_steps
    return [
        folder for folder, marker in committed[: -retention.latest_k] if folder not in best and not (every and marker.step % every == 0)
    ]
