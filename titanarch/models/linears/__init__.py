"""Linear layers: what a component's projections are made of."""

from titanarch.models.linears import dense, monarch

__all__ = ["dense", "monarch"]
