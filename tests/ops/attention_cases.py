"""Attention problems that several tests share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titanarch.ops.biased_attention import AttentionDropout, AttentionTokens


@dataclass(frozen=True)
class Case:
    """One problem; ``queries`` cuts a shard out of the queries, ``order`` shuffles the keys' and queries' indices."""

    n_tokens: int = 150
    n_heads: int = 4
    n_key_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    table: bool = True
    causal: bool = True
    packed: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    queries: tuple[int, int] | None = None
    order: str = "contiguous"
    learn_table: bool = True
    lse: bool = False


CASES = {
    "learned": Case(),
    "one document": Case(packed=False),
    "fixed table": Case(learn_table=False),
    "no table": Case(table=False),
    "no table, one document": Case(table=False, packed=False),
    "gqa": Case(n_key_heads=2),
    "mqa, fixed table": Case(n_key_heads=1, learn_table=False),
    "heads that do not divide": Case(n_heads=3, n_key_heads=2),
    "window": Case(window=40),
    "window without table": Case(window=17, table=False, packed=False),
    "soft cap": Case(soft_cap=1.5),
    "sinks": Case(sinks=True),
    "sinks, fixed table": Case(sinks=True, learn_table=False),
    "other value dim": Case(value_dim=5),
    "dropout": Case(dropout=0.3),
    "lse": Case(lse=True, learn_table=False),
    "lse, sinks, cap": Case(lse=True, sinks=True, soft_cap=2.0),
    "shard": Case(queries=(60, 110)),
    "shard, fixed table": Case(queries=(100, 150), learn_table=False, packed=False),
    "shard with window, sinks, blind queries": Case(queries=(90, 150), window=20, sinks=True, order="keys first half"),
    "blind queries": Case(queries=(90, 150), window=20, order="keys first half", lse=True),
    "blind queries, flash": Case(queries=(90, 150), window=20, order="keys first half", learn_table=False),
    "blind queries, looked up": Case(queries=(90, 150), window=20, order="shuffled keys first half", value_dim=3),
    "bidirectional": Case(causal=False),
    "bidirectional, window": Case(causal=False, window=30, learn_table=False),
    "bidirectional, shuffled": Case(causal=False, order="shuffled"),
    "shuffled": Case(order="shuffled"),
    "shuffled, fixed table": Case(order="shuffled", learn_table=False),
    "shuffled, no table, window": Case(order="shuffled", table=False, window=25),
    "shuffled, no table": Case(order="shuffled", table=False, value_dim=4),
    "everything": Case(n_key_heads=2, window=70, soft_cap=3.0, sinks=True, dropout=0.2, value_dim=6, queries=(30, 140), lse=True),
    "everything, shuffled": Case(n_key_heads=2, window=70, soft_cap=3.0, sinks=True, dropout=0.2, order="shuffled", lse=True),
    "one token past a block": Case(n_tokens=65),
    "short": Case(n_tokens=3),
}


def tokens(case: Case) -> tuple[AttentionTokens, AttentionTokens]:
    generator = torch.Generator().manual_seed(5)
    index_T = torch.arange(case.n_tokens) + 7
    document_BT = torch.stack([(index_T > 7 + cut).long() + (index_T > 90).long() for cut in (20, 75)])
    first, last = case.queries or (0, case.n_tokens)
    key_slice = slice(0, case.n_tokens // 2 if "first half" in case.order else case.n_tokens)
    keys, queries = torch.arange(case.n_tokens)[key_slice], torch.arange(first, last)
    if "shuffled" in case.order:
        keys = keys[torch.randperm(len(keys), generator=generator)]
        queries = queries[torch.randperm(len(queries), generator=generator)]
    return tuple(AttentionTokens(index_T[part], document_BT[:, part]) for part in (queries, keys))  # type: ignore[return-value]


def problem(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Leaf tensors by name, and the other arguments."""
    torch.manual_seed(3)
    query, key = tokens(case)
    n_queries, n_keys = len(query.index_T), len(key.index_T)
    leaves = {
        "q_BTHK": torch.randn(2, n_queries, case.n_heads, case.head_dim, dtype=dtype),
        "k_BSGK": torch.randn(2, n_keys, case.n_key_heads, case.head_dim, dtype=dtype),
        "v_BSGV": torch.randn(2, n_keys, case.n_key_heads, case.value_dim, dtype=dtype),
    }
    if case.table:
        n_entries = case.n_tokens + 5
        leaves["table_HN"] = torch.randn(case.n_heads, n_entries if case.causal else 2 * n_entries - 1, dtype=dtype)
    if case.sinks:
        leaves["sinks_H"] = torch.randn(case.n_heads, dtype=dtype)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != "table_HN" or case.learn_table)
    rest: dict[str, object] = {
        "query": query, "key": key, "scale": 0.5, "causal": case.causal, "packed": case.packed, "window": case.window,
        "soft_cap": case.soft_cap, "contiguous": "shuffled" not in case.order, "return_lse": case.lse,
        "dropout": AttentionDropout(case.dropout, 11, torch.tensor([4, 9]), 2, first_head=3) if case.dropout else None,
    }  # fmt: skip
    return leaves, rest


def run(attention: object, leaves: dict[str, Tensor], rest: dict[str, object]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    y_BTHV, lse_BTH = attention(**leaves, **rest)  # type: ignore[operator]
    torch.manual_seed(1)
    loss = (y_BTHV * torch.randn(y_BTHV.shape, dtype=y_BTHV.dtype)).sum()
    results = {"y": y_BTHV.detach()}
    if lse_BTH is not None:
        results["lse"] = lse_BTH.detach()
        loss = loss + (lse_BTH * torch.randn(lse_BTH.shape, dtype=lse_BTH.dtype)).masked_fill(lse_BTH == -math.inf, 0.0).sum()
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return results | dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
