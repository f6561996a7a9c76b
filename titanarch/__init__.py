"""titanarch: find out which language-model architecture is better, then train the winner at scale."""

__version__ = "0.1.0"
