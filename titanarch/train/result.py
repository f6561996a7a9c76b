"""Numbers of ``result.json`` that follow from what a model is and what it was trained on."""

from collections.abc import Mapping

from titanarch.contract.cost import Cost
from titanarch.data.phases import Phases


def sizes(cost: Cost) -> dict[str, float]:
    """Of a model."""
    return {
        "parameters": cost.parameters,
        "non_embedding_parameters": cost.non_embedding_parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops_per_token": cost.forward_flops_per_token,
    }


def training_flops(phases: Phases, next_row: int, n_tokens: int, flops_per_token: Mapping[int, float]) -> float:
    """Of ``n_tokens`` that were trained on, lengths in the shares that the rows before ``next_row`` have.

    ``flops_per_token``: in training, by the length of rows.
    """
    tokens = [(length, rows * length) for length, rows in phases.state(next_row)]
    flops = sum(n * flops_per_token[length] for length, n in tokens)
    return flops / max(sum(n for _, n in tokens), 1) * n_tokens
