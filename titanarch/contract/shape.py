"""What a component may know of the model it is part of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes shared by the whole model.

    ``d_model``: width, channels. ``vocab_size``: rows of the embedding. ``seq_len``: longest sequence trained on,
    tokens; evaluation may go beyond it. ``layers``: the name of each block's sequence mixer, first block first.
    """

    d_model: int
    vocab_size: int
    seq_len: int
    layers: tuple[str, ...]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def is_first_of_its_name(self, layer: int) -> bool:
        """Whether no earlier block has the mixer that block ``layer`` has."""
        return self.layers.index(self.layers[layer]) == layer
