"""Registers an attention that prefers HEADS, as a user's module named in ``experimental.custom_import`` would."""

from typing import ClassVar

from titanarch.contract.mixer import mixer
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.attention import Attention, AttentionConfig


class HeadsFirstConfig(AttentionConfig):
    """The keys of attention."""

    kind: ClassVar[str] = ""


@mixer("heads_first")
class HeadsFirst(Attention):
    """Attention with another order of preference."""

    Config = HeadsFirstConfig
    context_parallel = (ContextParallel.HEADS, ContextParallel.GATHER)
