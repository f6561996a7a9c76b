"""Registers an attention that prefers HEADS, as a user's module named in ``experimental.custom_import`` would."""

from titanarch.contract.mixer import mixer
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.attention import Attention, AttentionConfig


class HeadsFirstConfig(AttentionConfig):
    """The keys of attention."""


@mixer("heads_first")
class HeadsFirst(Attention):
    """Attention with another order of preference."""

    Config = HeadsFirstConfig
    context_parallel = (ContextParallel.HEADS, ContextParallel.GATHER)
