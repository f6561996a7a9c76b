"""Decoding a token at a time: a stage's encoder and decoder step at every token, what is inside at a chunk's beginning.

Rows begin chunks at different tokens, so everything inside the first stage is kept and stepped a row at a time.

Shapes: B rows, D model dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titanarch.contract.mixer import State
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.block import Block
from titanarch.models.hnet.chunks import LEAST_WEIGHT, MOST_WEIGHT
from titanarch.models.hnet.stage import Main, Stack, Stage


class HNetStates:
    """The states of a level in one list: its blocks', its stage's own, then those of the level inside, row after row.

    A stage's own are ``last``, what its router read before, [B, 1, D]; ``average`` of the chunks, fp32, [B, 1, D]; ``n_chunks``, [B].

    ``block_state``: of a block before the first token, for a number of rows. ``like``: dtype and device of the states.
    """

    def __init__(self, stages: Sequence[Stage], main: Main, *, block_state: Callable[[Block, int], State], like: Tensor) -> None:
        self.stages = stages
        self.main = main
        self.block_state = block_state
        self.like = like

    def initial(self, number: int, n_rows: int) -> list[State]:
        """Before the first token, of level ``number`` and all inside it."""
        states = [self.block_state(block, n_rows) for stack in self._stacks(number) for block in stack.bare_blocks]
        if number == len(self.stages):
            return states
        like, D = self.like, self.stages[number].d_model
        average_dtype = torch.promote_types(like.dtype, torch.float32)
        states.append(
            {
                "last": like.new_zeros(n_rows, 1, D),
                "average": like.new_zeros(n_rows, 1, D, dtype=average_dtype),
                "n_chunks": torch.zeros(n_rows, dtype=torch.int64, device=like.device),
            }
        )
        return states + [state for _ in range(n_rows) for state in self.initial(number + 1, 1)]

    def step(self, number: int, x_B1D: Tensor, index: int, states: list[State]) -> tuple[Tensor, list[State]]:
        """Token ``index`` of level ``number``: what the level makes of it, and all states after it."""
        stacks = self._stacks(number)
        sizes = [len(stack.bare_blocks) for stack in stacks]
        carry, before = Carry.empty(), states[: sizes[0]]
        x_B1D, carry, after = _step_stack(stacks[0], x_B1D, index, carry, before)
        if number == len(self.stages):
            return stacks[0].normed(x_B1D), after
        stage, x_B1D = self.stages[number], stacks[0].normed(x_B1D)
        n_blocks = sum(sizes)
        read_B1D, own, inner = self._chunk(number, x_B1D, index, states[n_blocks], states[n_blocks + 1 :])
        y_B1D, _, decoded = _step_stack(stage.decoder, stage.joined(x_B1D, read_B1D), index, carry, states[sizes[0] : n_blocks])
        return stage.decoder.normed(y_B1D), [*after, *decoded, own, *inner]

    def _chunk(self, number: int, x_B1D: Tensor, index: int, own: State, inner: list[State]) -> tuple[Tensor, State, list[State]]:
        """What the token reads of the chunks: rows where one begins step through what is inside."""
        stage, n_rows = self.stages[number], len(x_B1D)
        p_B1 = stage.router.between(own["last"], x_B1D) if index else x_B1D.new_ones(n_rows, 1)
        each, averages, new_inner = len(inner) // n_rows, list(own["average"].split(1)), []
        n_chunks_B = own["n_chunks"] + (p_B1[:, 0] > 0.5)
        for row, (p, begun, had) in enumerate(zip(p_B1.unbind(), n_chunks_B.tolist(), own["n_chunks"].tolist(), strict=True)):
            states = inner[row * each : (row + 1) * each]
            if begun > had:
                z, states = self.step(number + 1, stage.widened(x_B1D[row : row + 1]), had, states)
                z = z[..., : stage.d_model].to(averages[row].dtype)
                weight = p.clamp(LEAST_WEIGHT, MOST_WEIGHT) if had else 1.0
                averages[row] = weight * z + (1 - weight) * averages[row]
            new_inner += states
        average_B1D = torch.cat(averages)
        return average_B1D, {"last": x_B1D, "average": average_B1D, "n_chunks": n_chunks_B}, new_inner

    def _stacks(self, number: int) -> list[Stack]:
        if number == len(self.stages):
            return [self.main]
        return [self.stages[number].encoder, self.stages[number].decoder]


def _step_stack(stack: Stack, x_B1D: Tensor, index: int, carry: Carry, states: list[State]) -> tuple[Tensor, Carry, list[State]]:
    whole = SequenceInfo.whole(len(x_B1D), index + 1, device=x_B1D.device)
    last = whole.some(lambda x, dim: x.narrow(dim, index, 1))
    new_states = []
    for block, state in zip(stack.bare_blocks, states, strict=True):
        x_B1D, carry, state = block.step(x_B1D, MixSequence(query=last, key=whole, site=block.layer), carry, state)
        new_states.append(state)
    return x_B1D, carry, new_states
