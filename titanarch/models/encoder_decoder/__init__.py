"""An encoder-decoder that restores corrupted spans of its rows (T5, arXiv:1910.10683)."""
