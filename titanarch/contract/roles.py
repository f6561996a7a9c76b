"""What an optimizer may know of a parameter."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn


class Kind(Enum):
    """HIDDEN: a matrix between hidden layers. EMBEDDING: token and position tables. HEAD: the output matrix.
    VECTOR: gains, biases and everything else that is not a matrix."""

    HIDDEN = "hidden"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"


@dataclass(frozen=True)
class Role:
    """``decay``: takes weight decay. ``lr_group``: the name of its learning-rate group. ``muon``: a 2-D hidden
    matrix that Muon may orthogonalise; all others go to AdamW."""

    kind: Kind
    decay: bool
    lr_group: str = "default"
    muon: bool = False

    def with_lr_group(self, lr_group: str) -> "Role":
        return replace(self, lr_group=lr_group)


HIDDEN = Role(Kind.HIDDEN, decay=True, muon=True)
EMBEDDING = Role(Kind.EMBEDDING, decay=True)
HEAD = Role(Kind.HEAD, decay=True)
VECTOR = Role(Kind.VECTOR, decay=False)


@runtime_checkable
class HasRoles(Protocol):
    """A module that declares roles of its own parameters, by the parameter's name in it."""

    roles: ClassVar[dict[str, Role]]


@runtime_checkable
class HasLearningRate(Protocol):
    """A module whose parameters, all below it, are the learning-rate group ``lr_group``; None leaves them as their roles say."""

    lr_group: str | None


def role_of(module: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    """The declared role of ``module``'s own parameter ``name``, else by its shape: matrices are HIDDEN."""
    if isinstance(module, HasRoles) and name in module.roles:
        return module.roles[name]
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return HIDDEN if parameter.dim() == 2 and isinstance(module, nn.Linear) else VECTOR


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Every parameter's role by its qualified name."""
    roles = {
        (f"{prefix}.{name}" if prefix else name): role_of(module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for prefix, module in model.named_modules():
        if isinstance(module, HasLearningRate) and module.lr_group is not None:
            below = [name for name in roles if name.startswith(f"{prefix}.")]
            roles |= {name: roles[name].with_lr_group(module.lr_group) for name in below}
    return roles
