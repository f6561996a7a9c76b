"""What a checkpoint holds of a run beside its weights and optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol

from titanarch.checkpoint.store import Checkpointer
from titanarch.data.loader import RowLoader
from titanarch.train.budget import Budget
from titanarch.train.gradients import LossScaler
from titanarch.train.guard import GradientGuard


class _Stateful(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class Progress:
    """Steps and tokens done, and the small states that go with them."""

    def __init__(self, *, budget: Budget, scaler: LossScaler, guard: GradientGuard, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self.step = 0
        self.tokens = 0
        self._parts: dict[str, _Stateful] = {"budget": budget, "scaler": scaler, "guard": guard}

    def state_dict(self) -> dict[str, Any]:
        """Collective: the time spent is that of process 0's clock."""
        parts = self._checkpointer.processes.from_first(lambda: {name: part.state_dict() for name, part in self._parts.items()})
        return {"step": self.step, "tokens": self.tokens, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


class DataState:
    """The loader's place in the data, as one state that any layout loads."""

    def __init__(self, loader: RowLoader, checkpointer: Checkpointer) -> None:
        self.loader = loader
        self.checkpointer = checkpointer

    def state_dict(self) -> dict[str, Any]:
        """Collective: the cursors of all processes' streams are joined."""
        state = self.loader.state_dict()
        return {**state, "cursors": self.checkpointer.merge(state["cursors"])} if "cursors" in state else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
