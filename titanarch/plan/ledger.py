"""An account of every storage and every collective of a piece of code, kept under torch's dispatcher.

It serves a trace with fake tensors and a real run alike. What a storage was for is known only later (a gradient is what
outlives the backward), so events are written down and the peak is found by going through them once more at the end.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titanarch.plan.collectives import Collective, Group, collective_of, name_of

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer states"
ACTIVATIONS = "activations"
GATHERED = "gathered and communication"
OTHER = "other"
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, GATHERED, OTHER)

_READ = torch.ops.aten._local_scalar_dense.default
_WRAPPERS = (DTensor, AsyncCollectiveTensor)
_COMMUNICATING = ("c10d::", "_c10d_functional::", "fsdp::")


@dataclass
class _Storage:
    """``born``: what was going on when it was first seen: forward, backward, or a phase's name."""

    born: str
    category: str
    n_bytes: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when most were alive, by category."""

    by_category: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_category.values())


@dataclass(eq=False)
class Ledger(TorchDispatchMode):
    """Use as a context around the code; set ``phase`` and ``scope`` as it goes on.

    ``phase``: ``step`` inside a training step (forward or backward is told by itself), else the name of what goes on.
    ``scope``: the key under which collectives are counted. ``fake``: the FakeTensorMode of a trace; reads of values, such
    as that of the gradient's norm, then give 1.
    """

    fake: Any = None
    phase: str = "step"
    scope: str = ""
    sent: defaultdict[tuple[str, Group, str], float] = field(default_factory=lambda: defaultdict(float))
    """Bytes sent by (scope, group, kind)."""
    calls: Counter[tuple[str, Group, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._storages: list[_Storage] = []
        self._events: list[tuple[int, int]] = []
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._first_event = self._fake_depth = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Ledger":
        original, ledger = self._resize, self

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = original(storage, size)
            ledger._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self._fake_depth = 0 if self.fake is None else len(self.fake.enter_stack)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._is_shape_propagation():
            return func(*args, **kwargs)
        if any(issubclass(kind, _WRAPPERS) for kind in types):
            return NotImplemented  # they come back with what they hold
        if self.fake is not None and func is _READ:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        name = name_of(func)
        if name.startswith(_COMMUNICATING):
            self._communicated(name, args, kwargs, out)
        return out

    def _is_shape_propagation(self) -> bool:
        """DTensor works out global shapes in a fake mode: another one, or the trace's entered once more."""
        if active_fake_mode() is not self.fake:
            return True
        return self.fake is not None and len(self.fake.enter_stack) > self._fake_depth

    def start_peak(self) -> None:
        """The peak is looked for from here on."""
        self._first_event = len(self._events)

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what ``tensors`` are, also for the time before."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._see(local)
            self._storages[self._numbers[local.untyped_storage()._cdata]].category = category

    def mark_survivors(self, category: str) -> None:
        """Say what everything is that was born in a step's forward or backward and is alive now."""
        for number in self._numbers.values():
            storage = self._storages[number]
            if storage.n_bytes and (storage.born == "backward" or (storage.born == "forward" and storage.category == ACTIVATIONS)):
                storage.category = category

    def peak(self) -> Peak:
        """Of everything since ``start_peak``."""
        now: Counter[str] = Counter()
        best, total, largest = dict.fromkeys(CATEGORIES, 0), 0, -1
        for index, (number, change) in enumerate(self._events):
            now[self._storages[number].category] += change
            total += change
            if index >= self._first_event and total > largest:
                largest, best = total, {category: now[category] for category in CATEGORIES}
        return Peak(best)

    def alive(self) -> int:
        """Bytes alive now."""
        return sum(change for _, change in self._events)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        number = self._numbers.get(address)
        if number is None:
            self._add(storage, address)
        elif self._storages[number].n_bytes != storage.nbytes():
            self._resized(storage)

    def _add(self, storage: torch.UntypedStorage, address: int) -> None:
        number, born = len(self._storages), self._now()
        self._storages.append(_Storage(born, ACTIVATIONS if born == "forward" else OTHER, storage.nbytes()))
        self._numbers[address] = number
        self._events.append((number, storage.nbytes()))
        self._references[number] = weakref.ref(storage, lambda _: self._freed(number, address))

    def _now(self) -> str:
        if self.phase != "step":
            return self.phase
        # What is recomputed in the backward is activations again.
        return "backward" if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled() else "forward"

    def _freed(self, number: int, address: int) -> None:
        self._change(number, 0)
        self._numbers.pop(address, None)
        self._references.pop(number, None)

    def _change(self, number: int, n_bytes: int) -> None:
        storage = self._storages[number]
        self._events.append((number, n_bytes - storage.n_bytes))
        storage.n_bytes = n_bytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP frees and allocates gathered weights by resizing."""
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self._change(number, storage.nbytes())
            self._storages[number].category = GATHERED

    def _communicated(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        collective = collective_of(name, args)
        if collective is not None:
            self._count(collective)
        written = tree_leaves((out, kwargs.get("out"), args[0] if "_base_" in name else None))
        for tensor in written:
            if isinstance(tensor, Tensor) and not isinstance(tensor, _WRAPPERS):
                number = self._numbers.get(tensor.untyped_storage()._cdata)
                if number is not None:
                    self._storages[number].category = GATHERED

    def _count(self, collective: Collective) -> None:
        key = (self.scope, collective.group, collective.kind)
        self.sent[key] += collective.sent_bytes
        self.calls[key] += 1
