"""Chunked recurrences against the same recurrences token by token, forward and backward; and how time and memory grow with length.

    python -m benchmarks.recurrences                                  # 1 thread, 2,048 tokens; 2k, 8k and 32k for growth
    python -m benchmarks.recurrences --only gla --tokens 256 --rounds 4 --lengths 256 512 --record ""

Sizes are those of a block 256 wide. The token-by-token side takes its inputs apart once, by ``unbind``; published naive forms index
them in every step, whose backward fills zeros of the whole input for each token; where that form is given, it is timed once.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Comparison, call, compare, memory_rise_bytes, record
from titanarch.ops.decay_recurrence import decay_recurrence, decay_recurrence_naive
from titanarch.ops.delta_recurrence import delta_rule, diagonal_plus_low_rank, naive_recurrence

Program = Callable[[], tuple[Tensor, ...]]
Recurrence = Callable[..., tuple[Tensor, Tensor]]
CHUNKED, PER_TOKEN, PUBLISHED = "chunked", "token by token", "published, token by token"


@dataclass(frozen=True)
class Op:
    """``shapes``: of the inputs without (B, T), in the order of ``chunked``. ``decays``, ``rates``: which inputs are log decays, and
    which lie in 0 to 1; ``units``: which are of length 1. All forms take ``starts_BT`` and ``state``.
    ``published``: token by token as others have it."""

    shapes: tuple[tuple[int, ...], ...]
    chunked: Recurrence
    per_token: Recurrence
    decays: tuple[int, ...]
    rates: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    published: Recurrence | None = None


def delta_rule_per_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, starts_BT: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The delta rule in the general form."""
    g, b = log_decay.expand_as(k), beta[..., None] * k
    return naive_recurrence(q, b, v, g, -torch.exp(g) * k, b, starts_BT=starts_BT, state=state)


def decay_by_index(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, starts_BT: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """A decaying recurrence, inputs indexed and outputs written in place, as in flash-linear-attention's naive forms."""
    n_heads, y = v.shape[2], torch.zeros_like(v)
    S = torch.zeros(v.shape[0], n_heads, k.shape[3], v.shape[3]) if state is None else state
    for t in range(v.shape[1]):
        decay = log_decay[:, t].exp().reshape(v.shape[0], n_heads, -1, 1) * ~starts_BT[:, t, None, None, None]
        S = S * decay + k[:, t].expand(-1, n_heads, -1)[..., None] * v[:, t, :, None]
        y[:, t] = (q[:, t].expand(-1, n_heads, -1)[..., None] * S).sum(-2)
    return y, S


def delta_rule_of_qwen3_next(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, starts_BT: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of transformers; the row is one document to it, and queries are divided by sqrt(K)."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule  # slow, and only timed

    y, last = torch_recurrent_gated_delta_rule(q, k, v, log_decay.squeeze(-1), beta, state, output_final_state=True)
    return y, last


def delta_rule_of_kimi_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, starts_BT: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of transformers; the row is one document to it, and queries are divided by sqrt(K)."""
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention  # slow, and only timed

    y, last = recurrent_kimi_delta_attention(q, k, v, log_decay, beta, state, output_final_state=True)
    return y, last


KEYS, VALUES = (4, 64), (4, 64)
OPS = {
    "mamba2": Op(((1, 128), (1, 128), (8, 64), (8,)), decay_recurrence, decay_recurrence_naive, decays=(3,), published=decay_by_index),
    "retnet": Op((KEYS, KEYS, (4, 128), (4,)), decay_recurrence, decay_recurrence_naive, decays=(3,), published=decay_by_index),
    "gla": Op(((4, 32), (4, 32), VALUES, (4, 32)), decay_recurrence, decay_recurrence_naive, decays=(3,), published=decay_by_index),
    "gla, wide keys": Op((KEYS, KEYS, VALUES, KEYS), decay_recurrence, decay_recurrence_naive, decays=(3,), published=decay_by_index),
    "gated delta net": Op(
        (KEYS, KEYS, VALUES, (4, 1), (4,)),
        delta_rule,
        delta_rule_per_token,
        decays=(3,),
        rates=(4,),
        units=(1,),
        published=delta_rule_of_qwen3_next,
    ),
    "kda": Op(
        (KEYS, KEYS, VALUES, KEYS, (4,)),
        delta_rule,
        delta_rule_per_token,
        decays=(3,),
        rates=(4,),
        units=(1,),
        published=delta_rule_of_kimi_linear,
    ),
    "rwkv7": Op((KEYS, KEYS, VALUES, KEYS, KEYS, KEYS), diagonal_plus_low_rank, naive_recurrence, decays=(3,), units=(4, 5)),
}
"""By name; another op is a line here."""


def make(name: str, side: str, n_tokens: int, threads: int) -> Program:
    """One side's forward and backward on the same inputs: a function that returns the outputs and the gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    op = OPS[name]
    leaves: list[Tensor] = []
    for number, shape in enumerate(op.shapes):
        x = torch.randn(1, n_tokens, *shape)
        if number in op.decays:
            x = -0.1 * torch.nn.functional.softplus(x)
        elif number in op.rates:
            x = torch.sigmoid(x)
        elif number in op.units:
            # The last two of the general form, a and b of a b^T, are opposed, so that the state does not grow.
            x = torch.nn.functional.normalize(x, dim=-1) if number < 5 else -leaves[4].detach()
        leaves.append(x.requires_grad_())
    starts_BT = torch.zeros(1, n_tokens, dtype=torch.bool)
    starts_BT[:, 0] = starts_BT[:, n_tokens // 3] = True
    run = {CHUNKED: op.chunked, PER_TOKEN: op.per_token, PUBLISHED: op.published}[side]
    assert run is not None, f"{name} has no form {side}"
    upstream: list[Tensor] = []

    def program() -> tuple[Tensor, ...]:
        y, _ = run(*leaves, starts_BT=starts_BT, state=None)
        if not upstream:
            upstream.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        return (y.detach(), *torch.autograd.grad(y, leaves, upstream[0]))

    return program


def exponent(lengths: list[int], values: list[float]) -> float:
    """Of length in value ~ length^p, by least squares in logarithms."""
    x, y = [math.log(n) for n in lengths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def growth(name: str, lengths: list[int], threads: int, n_calls: int) -> dict[str, Any]:
    """Processor seconds, each the least of ``n_calls``, and the rise of memory of the chunked form at each length, with exponents."""
    samples, seconds, memory = [], [], []
    for n_tokens in lengths:
        program = make(name, CHUNKED, n_tokens, threads)
        program()
        calls = [call(program).cpu_seconds for _ in range(n_calls)]
        samples.append(calls)
        seconds.append(min(calls))
        memory.append(memory_rise_bytes(make, name, CHUNKED, n_tokens, threads))
    return {
        "op": name,
        "lengths": lengths,
        "cpu_seconds": samples,
        "memory_rise_bytes": memory,
        "time_exponent": exponent(lengths, seconds),
        "memory_exponent": exponent(lengths, [float(n) for n in memory]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", default="recurrences", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    results: list[Comparison | dict[str, Any]] = []
    for name in options.only:
        sides = {side: make(name, side, options.tokens, options.threads) for side in (CHUNKED, PER_TOKEN)}
        pairs = zip(sides[CHUNKED](), sides[PER_TOKEN](), strict=True)
        differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        print(f"{name}: outputs and gradients differ by {max(differences):.1e} of their largest entry")
        comparison = compare(*((f"{name}, {side}", program) for side, program in sides.items()), n_rounds=options.rounds)
        print(comparison.summary(), flush=True)
        if OPS[name].published is not None:
            published = make(name, PUBLISHED, options.tokens, options.threads)
            make(name, PUBLISHED, 8, options.threads)()  # what it imports
            seconds = call(published).wall_seconds
            print(
                f"{name}, {PUBLISHED}: {seconds:.3g} s, {seconds / comparison.first_median_seconds:.0f} times the chunked form", flush=True
            )
            results.append({"op": name, "published_seconds": seconds})
        grown = growth(name, options.lengths, options.threads, n_calls=3)
        mebibytes = ", ".join(f"{n_bytes / 2**20:.0f}" for n_bytes in grown["memory_rise_bytes"])
        print(f"{name}: time ~ T^{grown['time_exponent']:.2f}, memory ~ T^{grown['memory_exponent']:.2f} ({mebibytes} MiB)", flush=True)
        results += [comparison, {"differences": differences, **grown}]
    if options.record:
        print(record(options.record, results, settings=vars(options)).name)


if __name__ == "__main__":
    main()
