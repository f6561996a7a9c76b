"""What recurrent mixers share: who computes the recurrence, the state that they begin with, how rates and steps are drawn.

Shapes: B rows.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Generator, Size, Tensor

from titanarch.contract.mixer import RecurrentMixer, State
from titanarch.models.short_conv import ShortConv
from titanarch.ops.recurrence_backend import note, why_not

FLA = ("fla",)
"""The package whose kernels serve these recurrences."""

Backend = Literal["auto", "reference", "fla"]
BACKEND = "who computes the recurrence: plain PyTorch (reference), or on CUDA the kernels of a package; auto: as installed"


class KernelMixer(RecurrentMixer):
    """A recurrent mixer with a ``backend`` in its table. ``state_shape``: of a row's state, set by its constructor."""

    kernels: ClassVar[tuple[str, ...]] = FLA
    """The packages whose kernels serve it, best first."""
    state_shape: tuple[int, ...]

    def why_not_on(self, device_type: str, *, compiled: bool) -> str:
        return why_not(self.config.backend, device_type, compiled=compiled)

    def note_on(self, device_type: str, *, compiled: bool) -> str:
        """Who computes the recurrence, and the convolutions before it."""
        said = note(self.config.backend, device_type, compiled=compiled, offered=self.kernels)
        parts = [f"recurrence by {said}"] if said else []
        convolutions = [
            said for child in self.children() if isinstance(child, ShortConv) and (said := child.note_on(device_type, compiled))
        ]
        return ", ".join([*parts, *dict.fromkeys(f"convolutions by {said}" for said in convolutions)])

    def initial_state(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> State:
        """Zeros, fp32 [B, *state_shape]."""
        return {"recurrent": torch.zeros(n_rows, *self.state_shape, device=device)}


def incoming(state: State | None) -> Tensor | None:
    """What the tokens before left; None where there are none."""
    return None if state is None else state["recurrent"]


def log_uniform(low: float, high: float, shape: Size, generator: Generator) -> Tensor:
    """log A with A ~ U(low, high)."""
    return torch.empty(shape, dtype=torch.float32).uniform_(low, high, generator=generator).log()


def step_biases(shape: Size, generator: Generator, *, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """The inverse softplus of steps drawn evenly in their logarithm, at least ``floor``; arXiv:2405.21060 has these defaults."""
    log_steps = torch.empty(shape, dtype=torch.float32).uniform_(math.log(low), math.log(high), generator=generator)
    steps = log_steps.exp().clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
