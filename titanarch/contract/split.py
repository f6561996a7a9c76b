"""How a component may be divided among processes: declarations only, applied by parallel/."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar


@dataclass(frozen=True)
class Split:
    """What tensor parallelism does with a child module, a parameter, or an entry of ``head_params``.

    ``COLUMN``: a Linear whose outputs are divided by head; ``COLUMN("n_kv_heads")`` names the field of the
    component's Config that counts them. Where the degree does not divide the heads the Linear is replicated and its
    gradient summed. ``ROW``: a Linear whose inputs are divided, outputs summed. ``PER_HEAD``: dimension 0 is
    heads. ``SHARED``: the same on all processes, used on local heads, so its gradient is summed.
    ``REPLICATED``: the same on all processes and used alike on all of them.
    """

    kind: str
    heads: str = "n_heads"

    COLUMN: ClassVar[Split]
    ROW: ClassVar[Split]
    PER_HEAD: ClassVar[Split]
    SHARED: ClassVar[Split]
    REPLICATED: ClassVar[Split]

    def count(self, config: Any) -> int:
        """The heads or hidden units of a COLUMN layer of a component with this Config: those of ``n_heads`` where it has no other."""
        return int(getattr(config, self.heads) or config.n_heads)

    def __call__(self, heads: str) -> Split:
        return replace(self, heads=heads)


Split.COLUMN = Split("column")
Split.ROW = Split("row")
Split.PER_HEAD = Split("per_head")
Split.SHARED = Split("shared")
Split.REPLICATED = Split("replicated")


class ContextParallel(Enum):
    """How a mixer lets the sequence be divided.

    HEADS: all-to-all to whole sequences of a slice of the heads. GATHER: local queries, all keys and values.
    RING: keys and values pass round, partial results are merged by their log-sum-exp. STATE: the recurrent state
    is handed from shard to shard.
    """

    HEADS = "heads"
    GATHER = "gather"
    RING = "ring"
    STATE = "state"


class Side(Enum):
    """Whether a stream follows the tokens that are written or the tokens that are read."""

    QUERY = "query"
    KEY = "key"


@dataclass(frozen=True)
class Stream:
    """One tensor [B, T, n_heads, ...] that ``project`` makes and ``mix`` reads.

    Query head j of H reads stream head j * n_heads // H.
    """

    side: Side
    n_heads: int
