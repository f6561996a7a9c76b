"""Trying remote reads again: exponential back-off with full jitter (Brooker, "Exponential backoff and jitter", AWS 2015)."""

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field

from titanarch.config.section import Section
from titanarch.data.errors import DataError, UnreachableFile, data_error

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CREDENTIALS_MISSING = ("NoCredentialsError", "PartialCredentialsError")
"""Of botocore, by name since it is an optional package."""

LOUD_FAILURES = 3  # of one read, from which on they are warnings


class RetryConfig(Section, identity=False):
    """How a read of a remote file is tried again. The wait after failure n is uniform in [0, min(max_backoff, initial_backoff 2^(n-1))]."""

    max_attempts: int = Field(8, ge=1, description="attempts of one read before it has failed for good")
    initial_backoff_seconds: float = Field(0.5, ge=0, allow_inf_nan=False, description="longest wait after the first failure, seconds")
    max_backoff_seconds: float = Field(30.0, ge=0, allow_inf_nan=False, description="longest wait after any failure, seconds")
    timeout_seconds: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="of one attempt over http, s3 and gcs, seconds; other protocols have their own"
    )


def _wait(seconds: float, closing: threading.Event) -> None:
    closing.wait(seconds)


def _draw() -> float:
    return random.SystemRandom().random()  # the generator of Python is part of a run's state


@dataclass(frozen=True)
class Reading:
    """How files are read. ``sleep`` waits some seconds, or until the file is closed; ``draw`` is uniform in [0, 1)."""

    retry: RetryConfig = RetryConfig()  # noqa: RUF009 (immutable)
    read_ahead_bytes: int = 16 << 20
    sleep: Callable[[float, threading.Event], None] = _wait
    draw: Callable[[], float] = _draw

    def persist(self, operation: Callable[[int], Result], *, url: str, offset: int, closing: threading.Event, unit: str = "byte") -> Result:
        """What ``operation`` returns, called with the number of failures before.

        Raises UnreachableFile with ``url``, ``offset`` (bytes as stored, or what ``unit`` says) and the cause, where an error is
        final, attempts are used up, or ``closing`` is set.
        """
        failures = 0
        while True:
            try:
                return operation(failures)
            except DataError:
                raise
            except Exception as error:
                failures += 1
                cause = f"{type(error).__name__}: {error}"
                if is_final(error) or failures >= self.retry.max_attempts or closing.is_set():
                    tried = f"after {failures} attempts" if failures > 1 else "at the first attempt"
                    message = f"cannot be read at {unit} {offset}, {tried}: {cause}"
                    raise data_error(message, file=url, kind=UnreachableFile) from error
                log = logger.warning if failures >= LOUD_FAILURES else logger.info
                log("%s: attempt %d at %s %d failed, trying again: %s", url, failures, unit, offset, cause)
            self.sleep(self.backoff_seconds(failures), closing)

    def backoff_seconds(self, failures: int) -> float:
        """How long to wait after that many failures."""
        longest = self.retry.initial_backoff_seconds * 2.0 ** min(failures - 1, 64)
        return self.draw() * min(self.retry.max_backoff_seconds, longest)


def is_final(error: BaseException) -> bool:
    """Whether trying again is useless: no such file, no permission, a request that the server calls wrong.

    fsspec's http turns any failure of a file's listing into FileNotFoundError; its cause tells.
    """
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return is_final(error.__cause__)
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    if type(error).__name__ in CREDENTIALS_MISSING:
        return True
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, TypeError, ValueError)
    return isinstance(error, final)


def http_status(error: BaseException) -> int | None:
    """The status of the answer that ``error`` reports: aiohttp and gcsfs keep it, huggingface_hub and requests their answer."""
    answer = getattr(error, "response", None)
    for holder, name in ((error, "status"), (answer, "status_code"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdigit()):
            return int(status)
    return None
