"""Channel mixers: what a block applies to each token by itself."""

from titanarch.models.channels import glu, mixed_act, mlp, moe, none, rwkv

__all__ = ["glu", "mixed_act", "mlp", "moe", "none", "rwkv"]
