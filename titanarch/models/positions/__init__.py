"""Position schemes: absolute ones change token embeddings, relative ones rotate queries and keys or bias logits."""

from titanarch.models.positions import alibi, ape, cpb, learned, none, rotary, sinusoidal, t5

__all__ = ["alibi", "ape", "cpb", "learned", "none", "rotary", "sinusoidal", "t5"]
