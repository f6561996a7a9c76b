"""Functions on several gloo processes, as the package's own checks of components start them."""

from titanarch.testing.processes import RankError, context, run_distributed

CONTEXT = context()

__all__ = ["CONTEXT", "RankError", "run_distributed"]
