"""What attention's CPU kernels are given, the blocks they work in, and the gradients they fill.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, M entries of the bias by distance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows [b0, b1), queries [r0, r1) counted from the last one backwards, keys [s0, s1), none where none is visible."""

    b0: int
    b1: int
    r0: int
    r1: int
    s0: int
    s1: int

    @property
    def rows(self) -> slice:
        return slice(self.b0, self.b1)

    @property
    def keys(self) -> slice:
        return slice(self.s0, self.s1)

    @property
    def n_queries(self) -> int:
        return self.r1 - self.r0

    @property
    def n_keys(self) -> int:
        return self.s1 - self.s0


@dataclass(frozen=True)
class Inputs:
    """All that a kernel takes. Documents: both or none. ``soft_cap`` 0 is no cap.

    ``bias_HM`` [H or 1, M] to ``aligned`` are the fields of :class:`titanarch.ops._attention_tokens.DistanceBias`.
    """

    q_BTHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor
    bias_HM: Tensor
    first: int
    visible_from: int
    visible_to: int
    aligned: bool
    query_index_T: Tensor
    key_index_S: Tensor
    query_document_BT: Tensor | None
    key_document_BS: Tensor | None
    sinks_H: Tensor | None
    dropout_key_B: Tensor | None
    dropout_p: float
    first_head: int
    scale: float
    soft_cap: float

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the bias' float32 or float64."""
        return self.bias_HM.dtype

    @property
    def n_heads(self) -> int:
        return self.q_BTHK.shape[2]

    def key_head(self, head: int) -> int:
        """The key head of a query head."""
        return head * self.k_BSGK.shape[2] // self.n_heads

    def tokens(self, block: Block) -> slice:
        """A block's queries in their order."""
        n_queries = self.q_BTHK.shape[1]
        return slice(n_queries - block.r1, n_queries - block.r0)

    def queries(self, x_BTHX: Tensor, block: Block, heads: slice) -> Tensor:
        """A block's queries of some heads in reversed order, a copy [b h, R, X] in the compute dtype."""
        x_bhRX = x_BTHX[block.rows, self.tokens(block), heads].transpose(1, 2).flip(2)
        return x_bhRX.to(self.dtype, memory_format=torch.contiguous_format).flatten(0, 1)

    def keys(self, x_BSGX: Tensor, block: Block, heads: slice) -> Tensor:
        """A block's keys or values for some query heads, [b h, s, X] in the compute dtype."""
        x_bsGX = x_BSGX[block.rows, block.keys]
        if self.n_heads == x_BSGX.shape[2]:
            x_bshX = x_bsGX[:, :, heads]
        elif heads.stop - heads.start == 1:
            x_bshX = x_bsGX[:, :, self.key_head(heads.start), None]
        else:
            x_bshX = x_bsGX[:, :, [self.key_head(head) for head in range(heads.start, heads.stop)]]
        return x_bshX.transpose(1, 2).to(self.dtype).flatten(0, 1)

    def add_keys(self, total_BSGX: Tensor, part_bhsX: Tensor, block: Block, heads: slice) -> None:
        """Adds a block's gradient of keys or values, [b h, s, X] or [b, h, s, X], to the whole."""
        n_heads = heads.stop - heads.start
        part_bhsX = part_bhsX.view(block.b1 - block.b0, n_heads, block.n_keys, -1)
        target_bsGX = total_BSGX[block.rows, block.keys]
        if self.n_heads == total_BSGX.shape[2]:
            target_bsGX[:, :, heads] += part_bhsX.transpose(1, 2)
            return
        for i in range(n_heads):
            target_bsGX[:, :, self.key_head(heads.start + i)] += part_bhsX[:, i]

    def entries(self, block: Block) -> Tensor:
        """Entries [R, s] of the bias by distance, reversed queries, where it is not ``aligned``."""
        query_R = self.query_index_T[self.tokens(block)].flip(0)
        distance_RS = query_R[:, None] - self.key_index_S[None, block.keys]
        return (self.first - distance_RS).clamp_(0, self.bias_HM.shape[1] - 1)

    def blocks(self, n_queries: int, n_rows: int) -> Iterator[Block]:
        """Blocks of at most so many queries and rows, without the keys that no query of the block can see."""
        for b0 in range(0, self.q_BTHK.shape[0], n_rows):
            b1 = min(b0 + n_rows, self.q_BTHK.shape[0])
            for r0 in range(0, self.q_BTHK.shape[1], n_queries):
                r1 = min(r0 + n_queries, self.q_BTHK.shape[1])
                s0, s1 = 0, self.k_BSGK.shape[1]
                if self.aligned:
                    s0, s1 = max(0, self.visible_from - (r1 - 1)), min(s1, self.visible_to - r0)
                yield Block(b0, b1, r0, r1, s0, max(s0, s1))


@dataclass(frozen=True)
class Gradients:
    """Of q [B, T, H, K] in its dtype, k, v, the bias by distance and the sinks (empty without them) in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    sinks: Tensor

    @staticmethod
    def zeros(a: Inputs) -> "Gradients":
        new = a.bias_HM.new_zeros
        n_sinks = 0 if a.sinks_H is None else a.sinks_H.shape[0]
        return Gradients(torch.zeros_like(a.q_BTHK), new(a.k_BSGK.shape), new(a.v_BSGV.shape), new(a.bias_HM.shape), new(n_sinks))


class Scratch:
    """Memory that the blocks of one call share: a name gives the same storage in every shape."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.stores: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        n_elements = math.prod(shape)
        store = self.stores.get(name)
        if store is None or store.numel() < n_elements:
            store = self.stores[name] = self.like.new_empty(n_elements)
        return store[:n_elements].view(shape)
