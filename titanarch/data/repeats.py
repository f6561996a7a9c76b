"""How often a run reads its data, and the refusal to read them many times unawares."""

from collections.abc import Sequence
from typing import NamedTuple

from titanarch.config.errors import ConfigError, Problem

MOST_EPOCHS = 4
"""Up to here repeated tokens are worth nearly as much as new ones (Muennighoff et al., arXiv:2305.16264)."""

_REMEDY = "give more data, train less, or set data.allow_repeat = true if that is meant"


class Passes(NamedTuple):
    """How much of a source is read: ``epochs`` passes over its ``tokens``. ``source``: its name in a mixture, else empty."""

    source: str
    epochs: float
    tokens: int

    def __str__(self) -> str:
        of = f" of {self.source}" if self.source else ""
        return f"{self.epochs:.2f} epochs{of} ({self.tokens:,} tokens)"


def check_repeats(passes: Sequence[Passes], *, allowed: bool) -> None:
    """Raise ConfigError where ``passes`` has more than MOST_EPOCHS of a source and that is not ``allowed``."""
    many = [each for each in passes if each.epochs > MOST_EPOCHS]
    if many and not allowed:
        raise ConfigError(
            Problem(f"the run would take {', '.join(map(str, many))}, more than {MOST_EPOCHS}: {_REMEDY}", "data.allow_repeat")
        )


def repeated(epoch: int, *, source: str = "the source") -> ConfigError:
    """What to raise when pass ``epoch``, counted from 1, begins and is not allowed."""
    message = f"epoch {epoch} of {source} begins here, and more than {MOST_EPOCHS} are not allowed: {_REMEDY}"
    return ConfigError(Problem(f"{message}; the run goes on from its newest checkpoint", "data.allow_repeat"))
