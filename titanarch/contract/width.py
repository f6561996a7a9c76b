"""The maximal update parametrization (muP, arXiv:2203.03466): learning rates and other settings hold at every width.

A model is compared with a base model of the same parts at another width, at which nothing changes. With r the growth of what a weight
reads (its fan-in against the base's), Adam and:

| weight | initial standard deviation | learning rate |
|---|---|---|
| reads and writes a growing width (hidden) | / sqrt(r) | / r |
| reads a growing width, writes a fixed one (a router, a gate a head) | / r | / r |
| head | as it is; what it reads is divided by r | as it is |
| embeddings, gains, biases, convolutions: all else | as it is | as it is |

and logits of attention are scaled by 1/K beyond the base's head size K. Factors sqrt(d_model) of embeddings and 1 / sqrt(d_model) of a
tied head are the base's at every width. Shapes are global, so no layout changes a factor.
"""

from torch import Tensor, nn

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.growth import Growth
from titanarch.contract.mixer import BaseMixer
from titanarch.contract.model import Model
from titanarch.contract.roles import Kind, roles_of

KEY = "optimizer.mup_base"


def maximal_update(model: Model, base: Model) -> dict[str, Growth]:
    """Give ``model``, on the meta device, what its width asks for, and return the growth of each parameter by name.

    Raises ConfigError where the two are not made of the same parts.
    """
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    if ours.keys() != theirs.keys():
        differing = sorted(ours.keys() ^ theirs.keys())
        raise ConfigError(Problem(f"the base model is made of other parts: {', '.join(differing[:4])}; change sizes alone", KEY))
    for mixer, base_mixer in zip(_mixers(model), _mixers(base), strict=True):
        mixer.grow_from(base_mixer)
    model.grow_from(base)
    roles = roles_of(model)
    read_by_head = next((n for n in ours if roles[n].kind is Kind.HEAD), None) or next(n for n in ours if roles[n].kind is Kind.EMBEDDING)
    model.output_multiplier = theirs[read_by_head].shape[-1] / ours[read_by_head].shape[-1]
    return {name: _growth(name, ours[name], theirs[name], roles[name].kind) for name in ours}


def _mixers(model: nn.Module) -> list[BaseMixer]:
    return [module for module in model.modules() if isinstance(module, BaseMixer)]


def _growth(name: str, ours: Tensor, theirs: Tensor, kind: Kind) -> Growth:
    if ours.dim() != theirs.dim():
        raise ConfigError(Problem(f"{name} has {ours.dim()} dimensions, in the base model {theirs.dim()}; change sizes alone", KEY))
    grown = [a / b for a, b in zip(ours.shape, theirs.shape, strict=True)]
    if all(ratio == 1 for ratio in grown):
        return Growth()
    is_matrix = kind is Kind.HIDDEN or (kind is Kind.VECTOR and sum(ratio != 1 for ratio in grown) > 1)
    return Growth(grown[-1], is_output=grown[-2] == 1) if is_matrix else Growth()
