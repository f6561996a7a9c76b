"""The update of a step: torch's optimizers as one."""

from typing import Any

import torch
from torch import Tensor


class Optimizers:
    """One or two of torch's optimizers, which together hold every trained parameter.

    ``torch_optimizers`` are what a checkpoint saves and loads. What is loaded brings states only: learning rates, decay and
    the like remain the configuration's.
    """

    def __init__(self, torch_optimizers: list[torch.optim.Optimizer], lr: float) -> None:
        """``lr``: the learning rate that ``lr`` reports, as configured."""
        self.torch_optimizers = torch_optimizers
        self._lr = lr
        self._factor = 1.0
        self._configured = [[_hyperparameters(group) for group in o.param_groups] for o in torch_optimizers]
        self._parameters: list[Tensor] = [p for o in torch_optimizers for group in o.param_groups for p in group["params"]]
        for torch_optimizer in torch_optimizers:
            torch_optimizer.register_load_state_dict_post_hook(self._restore)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, without the multipliers of groups."""
        return self._lr * self._factor

    def set_lr(self, factor: float) -> None:
        """Make every learning rate ``factor`` times what the configuration says."""
        if factor == self._factor:
            return
        self._factor = factor
        for torch_optimizer in self.torch_optimizers:
            self._restore(torch_optimizer)

    def step(self) -> None:
        for torch_optimizer in self.torch_optimizers:
            torch_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros."""
        if set_to_none:
            for parameter in self._parameters:  # torch's own walks the groups under a profiler's record
                parameter.grad = None
        else:
            for torch_optimizer in self.torch_optimizers:
                torch_optimizer.zero_grad(set_to_none=False)

    def _restore(self, torch_optimizer: torch.optim.Optimizer) -> None:
        """Give the groups the configured hyperparameters; loading makes new groups, with those of the checkpoint."""
        configured = next(c for c, o in zip(self._configured, self.torch_optimizers, strict=True) if o is torch_optimizer)
        for group, hyperparameters in zip(torch_optimizer.param_groups, configured, strict=True):
            group.update(hyperparameters)
            group["lr"] = hyperparameters["lr"] * self._factor


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
