"""Functions on several gloo processes, as the package's own checks of components start them."""

import socket

from titanarch.testing.processes import RankError, context, run_distributed

CONTEXT = context()

__all__ = ["CONTEXT", "RankError", "free_port", "run_distributed"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port
