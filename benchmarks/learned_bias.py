"""Attention with a learned bias by distance: the op against SDPA with the bias written out, forward and backward.

    python -m benchmarks.learned_bias                      # 2 threads, T = 4096, about 6 minutes on 2 idle cores
    python -m benchmarks.learned_bias --tokens 1024 --rounds 4 --record ""

The other side materializes [H, T, T] from the table and gives it to ``F.scaled_dot_product_attention``, which needs its
MATH path because the bias has a gradient. Also measured: a fixed table (such as ALiBi), no bias, peak memory, and how far
the gradients of the two sides agree.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import compare, memory_rise_bytes, record
from titanarch.ops.biased_attention import AttentionTokens, biased_attention

OURS, WRITTEN = "op, learned table", "SDPA, learned bias written out"
OURS_FIXED, WRITTEN_FIXED, BARE = "op, fixed table", "SDPA, fixed bias written out", "op, no bias"

Program = Callable[[], tuple[Tensor, ...]]


def materialized(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, table_HT: Tensor) -> Tensor:
    """SDPA with the whole bias, [B, T, H, K]."""
    index_T = torch.arange(q_BTHK.shape[1])
    distance_TT = index_T[:, None] - index_T[None, :]
    bias_HTT = table_HT[:, distance_TT.clamp(min=0)].masked_fill(distance_TT < 0, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HTT[None]).transpose(1, 2)


def make(name: str, shape: tuple[int, int, int, int], threads: int) -> Program:
    """One side's forward and backward on the same inputs: a function that returns the gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch, n_tokens, n_heads, head_dim = shape
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    table_HT = torch.randn(n_heads, n_tokens, requires_grad=name in (OURS, WRITTEN))
    upstream = torch.randn(shape)
    tokens = AttentionTokens(torch.arange(n_tokens), torch.zeros(batch, n_tokens, dtype=torch.long), start=0)
    leaves = (q, k, v, table_HT) if table_HT.requires_grad else (q, k, v)

    def op() -> tuple[Tensor, ...]:
        table = None if name == BARE else table_HT
        y, _ = biased_attention(q, k, v, query=tokens, key=tokens, scale=head_dim**-0.5, table_HN=table, packed=False)
        return torch.autograd.grad(y, leaves, upstream)

    def written() -> tuple[Tensor, ...]:
        return torch.autograd.grad(materialized(q, k, v, table_HT), leaves, upstream)

    return written if name in (WRITTEN, WRITTEN_FIXED) else op


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", default="learned_bias", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    shape = (options.batch, options.tokens, options.heads, options.head_dim)
    programs = {name: make(name, shape, options.threads) for name in (OURS, WRITTEN, OURS_FIXED, WRITTEN_FIXED, BARE)}

    pairs = zip(programs[OURS](), programs[WRITTEN](), strict=True)
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    print(f"gradients of q, k, v, table differ by {max(differences):.1e} of their largest entry")
    memory = {name: memory_rise_bytes(make, name, shape, options.threads) for name in (OURS, WRITTEN)}
    print(", ".join(f"{name}: {n_bytes / 2**20:.0f} MiB" for name, n_bytes in memory.items()))
    comparisons = []
    for first, second in ((OURS, WRITTEN), (OURS_FIXED, WRITTEN_FIXED), (BARE, OURS)):
        comparison = compare((first, programs[first]), (second, programs[second]), n_rounds=options.rounds)
        print(comparison.summary(), flush=True)
        comparisons.append(comparison)
    if options.record:
        extras = {"gradient_differences": differences, "memory_rise_bytes": memory}
        print(record(options.record, [*comparisons, extras], settings=vars(options)).name)


if __name__ == "__main__":
    main()
