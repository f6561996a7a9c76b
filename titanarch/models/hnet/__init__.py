"""H-Net: a language model whose inner stages see chunks that it learns to make (arXiv:2507.07955)."""
