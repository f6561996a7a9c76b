"""The energy-based transformer (arXiv:2507.02092): a model spec with its own objective."""
