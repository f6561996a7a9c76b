"""What a checkpoint holds of a run beside its weights and optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol

from titanarch.checkpoint.store import Checkpointer
from titanarch.data.row_loader import RowLoader
from titanarch.train.budget import Budget
from titanarch.train.step import TrainStep


class _Stateful(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class Progress:
    """Steps and tokens done, and the small states that go with them."""

    def __init__(self, *, budget: Budget, train_step: TrainStep, checkpointer: Checkpointer) -> None:
        self._checkpointer, self._layer_norms = checkpointer, train_step.layer_norms
        self.step = 0
        self.tokens = 0
        self._parts: dict[str, _Stateful] = {"budget": budget, "scaler": train_step.scaler, "guard": train_step.guard}

    def state_dict(self) -> dict[str, Any]:
        """Collective: the time spent is that of process 0's clock."""
        norms = self._layer_norms.state_dict()
        found = self._checkpointer.processes.from_first(
            lambda: {**{name: part.state_dict() for name, part in self._parts.items()}, "layer_norms": norms}
        )
        return {"step": self.step, "tokens": self.tokens, **found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        if "layer_norms" in state:  # not in what earlier versions saved
            self._layer_norms.load_state_dict(state["layer_norms"])


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

    def exchange(self) -> None:
        """Go on from the state of all where a phase gives this rank other streams with the next step. Collective there, else nothing."""
        if self.loader.wants_merged_state:
            self.load_state_dict(self.state_dict())

    def pass_rows(self, next_row: int) -> None:
        """Leave out the rows before ``next_row``. Collective where they begin such a phase."""
        while self.loader.next_row < next_row:
            self.exchange()
            next(self.loader)
