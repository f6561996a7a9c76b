"""Attention with a learned bias by distance: the op against SDPA with the bias written out, forward and backward.

    python benchmarks/learned_bias.py                      # 2 threads, T = 4096, about 5 minutes
    python benchmarks/learned_bias.py --tokens 1024 --rounds 4 --record ""

The other side materializes [H, T, T] from the table and gives it to ``F.scaled_dot_product_attention``, which needs its
MATH path because the bias has a gradient. Also measured: a fixed table (ALiBi) and no bias, and agreement of the results.
"""

import argparse

import torch
import torch.nn.functional as F
from measure import compare, record
from torch import Tensor

from titanarch.ops.biased_attention import AttentionTokens, biased_attention


def materialized(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, table_HT: Tensor) -> Tensor:
    """SDPA with the whole bias, [B, T, H, K]."""
    index_T = torch.arange(q_BTHK.shape[1])
    distance_TT = index_T[:, None] - index_T[None, :]
    bias_HTT = table_HT[:, distance_TT.clamp(min=0)].masked_fill(distance_TT < 0, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HTT[None]).transpose(1, 2)


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
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.batch, options.tokens, options.heads, options.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    table_HT = torch.randn(options.heads, options.tokens, requires_grad=True)
    fixed_HT = table_HT.detach().clone()
    upstream = torch.randn(shape)
    documents_BT = torch.zeros(options.batch, options.tokens, dtype=torch.long)
    query = AttentionTokens(torch.arange(options.tokens), documents_BT)

    def op(table: Tensor | None) -> Tensor:
        return biased_attention(q, k, v, query=query, key=query, scale=shape[3] ** -0.5, table_HN=table, packed=False)[0]

    def train(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, upstream)

    ours = ("op, learned table", lambda: train(op(table_HT), q, k, v, table_HT))
    whole = ("SDPA, bias written out", lambda: train(materialized(q, k, v, table_HT), q, k, v, table_HT))
    fixed = ("op, fixed table", lambda: train(op(fixed_HT), q, k, v))
    whole_fixed = ("SDPA flash, fixed bias written out", lambda: train(materialized(q, k, v, fixed_HT), q, k, v))
    without = ("op, no bias", lambda: train(op(None), q, k, v))
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours[1](), whole[1](), strict=True)]
    print("largest gradient difference, relative:", max(differences))
    pairs = ((ours, whole), (fixed, whole_fixed), (without, ours))
    comparisons = [compare(first, second, n_rounds=options.rounds) for first, second in pairs]
    for comparison in comparisons:
        print(comparison.summary())
    if options.record:
        agreement = {"gradients": ["q", "k", "v", "table"], "relative_differences": differences}
        print(record(options.record, [*comparisons, agreement], settings=vars(options)))


if __name__ == "__main__":
    main()
