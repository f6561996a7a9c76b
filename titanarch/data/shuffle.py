"""The order of streamed documents: blocks of the source's order, each shuffled by itself.

A block is a buffer that is filled, given out in a seeded order, and filled again. So the place of every document follows from the seed
and from the first document of its block, and nothing of the buffer need be saved: a resume reads the block again.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from titanarch.data.permutation import Permutation
from titanarch.data.sources import Position
from titanarch.data.split import Record


class Place(NamedTuple):
    """``number`` of a document in the order of its pass; ``block``: where the block that it is in begins."""

    number: int
    block: Position


class Shuffle(NamedTuple):
    """``n_documents``: documents of a block; 0 and 1 leave the source's order. ``seed`` orders them."""

    n_documents: int
    seed: int

    def block_start(self, number: int) -> int:
        """The first number of the block that holds ``number``."""
        return number - number % max(1, self.n_documents)

    def __call__(self, records: Iterator[Record], *, epoch: int) -> Iterator[tuple[Record, Place]]:
        """Each document with its place in the order of pass ``epoch``.

        ``records`` begin with a block; its contents are held in memory.
        """
        if self.n_documents <= 1:
            for record in records:
                yield record, Place(record.number, record.position)
            return
        while block := list(islice(records, self.n_documents)):
            first = block[0]
            assert self.block_start(first.number) == first.number, f"document {first.number} does not begin a block"
            order = Permutation(len(block), seed=self.seed, epoch=epoch, part=first.number)(np.arange(len(block)))
            for place, index in enumerate(order.tolist()):
                yield block[index], Place(first.number + place, first.position)
