"""How far a weight has grown against the same weight of a narrower model; ``contract.width`` says what follows."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """``fan_in``: what a weight reads, against the base model. ``is_output``: whether it writes a width that does not grow."""

    fan_in: float = 1.0
    is_output: bool = False

    @property
    def lr_factor(self) -> float:
        """Of Adam's learning rate."""
        return 1 / self.fan_in

    @property
    def std_factor(self) -> float:
        """Of an initial standard deviation that does not depend on the fan-in."""
        return 1 / self.fan_in if self.is_output else 1 / math.sqrt(self.fan_in)
