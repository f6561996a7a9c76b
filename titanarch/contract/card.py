"""What is told of a component beside what it declares: `titanarch components` and docs/components.md show it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Card(NamedTuple):
    """``title``: the component in a line. ``paper``: where it comes from, such as arXiv:2405.21060, or where none is, the source.

    ``reference``: the implementation by other hands that tests compare it with, as package and name, or the closed form.
    ``kernels``: packages whose kernels it can use on a GPU, beside plain PyTorch. ``differs``: checks of ``titanarch check`` that the
    component fails as it is meant to, by name, with the reason; reports show them as known.
    """

    title: str
    paper: str
    reference: str
    kernels: tuple[str, ...] = ()
    differs: Mapping[str, str] = MappingProxyType({})
