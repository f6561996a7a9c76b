"""What goes wrong with a checkpoint, said so that it can be mended."""

import errno

from torch.distributed.checkpoint.api import CheckpointException

_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(Exception):
    """A checkpoint could not be saved or loaded. Checkpoints committed earlier are untouched."""


def root_os_error(error: BaseException) -> OSError | None:
    """The OSError that ``error`` is or came from; torch reports a full disk as a RuntimeError about positions."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def failures_by_rank(error: BaseException) -> dict[int, BaseException]:
    """The exception of each process inside what ``torch.distributed.checkpoint`` raised."""
    if isinstance(error, CheckpointException):
        return {rank: wrapped[0] for rank, wrapped in error.failures.items()}
    return {0: error}


def save_failed(error: BaseException, path: str) -> CheckpointError:
    """Why a save into ``path`` failed, and what to do."""
    if isinstance(error, CheckpointError):
        return error
    failures = failures_by_rank(error)
    causes = [root_os_error(failure) for failure in failures.values()]
    if any(cause is not None and cause.errno in _FULL for cause in causes):
        return CheckpointError(
            f"{path}: the disk is full; the checkpoint was not written. Earlier checkpoints are intact. "
            "Free space, lower checkpoint.keep_latest_k, or put checkpoint.folder on a larger disk; the same command then resumes."
        )
    reasons = "; ".join(f"process {rank}: {type(failure).__name__}: {failure}" for rank, failure in sorted(failures.items()))
    return CheckpointError(
        f"{path}: the checkpoint was not written ({reasons}). Earlier checkpoints are intact. "
        "Check that every process can write to checkpoint.folder; the same command then resumes."
    )


def load_failed(error: BaseException, path: str) -> CheckpointError:
    """Why reading ``path`` failed after it verified, and what to do."""
    if isinstance(error, CheckpointError):
        return error
    reasons = "; ".join(f"process {rank}: {type(failure).__name__}: {failure}" for rank, failure in sorted(failures_by_rank(error).items()))
    return CheckpointError(
        f"{path}: the checkpoint could not be read ({reasons}). Check that every process can read the folder; "
        "if it is damaged, remove it or set checkpoint.load_step to an earlier step."
    )
