"""What is told of a component beside what it declares: `titanarch components` and docs/components.md show it."""

from typing import NamedTuple


class Card(NamedTuple):
    """``title``: the component in a line. ``paper``: where it comes from, such as arXiv:2405.21060, or where none is, the source.

    ``reference``: the implementation by other hands that tests compare it with, as package and name, or the closed form.
    ``kernels``: packages whose kernels it can use on a GPU, beside plain PyTorch.
    """

    title: str
    paper: str
    reference: str
    kernels: tuple[str, ...] = ()
