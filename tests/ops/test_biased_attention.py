"""The attention op against its definition, the definition against other people's models."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.attention_cases import CASES, Case, problem, run, tokens
from titanarch.ops import _attention_chunked, _attention_flash
from titanarch.ops import biased_attention as op
from titanarch.ops.biased_attention import AttentionDropout, AttentionTokens, biased_attention, reference_attention


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem goes through the kernels, in several blocks."""
    monkeypatch.setattr(op, "_SMALL_LOGITS", 0)
    monkeypatch.setattr(op, "_WHOLE_MASK", 0)
    monkeypatch.setattr(_attention_flash, "_BLOCK_MASK", 1)
    monkeypatch.setattr(_attention_chunked, "_BLOCK_LOGITS", 1 << 12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_its_definition_in_float64(case: Case) -> None:
    leaves, rest = problem(case)
    expected, got = run(reference_attention, leaves, rest), run(biased_attention, leaves, rest)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "name", ["one document", "fixed table", "no table", "gqa, fixed table", "heads that do not divide, fixed", "window"]
)
def test_a_written_out_mask_equals_the_definition(name: str) -> None:
    case = {
        "one document": Case(learn_table=False, packed=False),
        "fixed table": Case(learn_table=False),
        "no table": Case(table=False),
        "gqa, fixed table": Case(n_key_heads=2, learn_table=False),
        "heads that do not divide, fixed": Case(n_heads=3, n_key_heads=2, learn_table=False),
        "window": Case(window=9, causal=False, learn_table=False),
    }[name]
    leaves, rest = problem(case)
    rest["key"] = rest["query"]
    expected, got = run(reference_attention, leaves, rest), run(biased_attention, leaves, rest)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_several_heads_at_once_without_a_table_equal_the_definition(packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 96, 4, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    side = AttentionTokens(torch.arange(96), (torch.arange(96) // 40).expand(2, 96))
    found = []
    for attention in (reference_attention, biased_attention):
        y, lse = attention(*leaves, query=side, key=side, scale=0.3, packed=packed, return_lse=True)
        assert lse is not None
        found.append((y, lse, *torch.autograd.grad(y.square().sum() + lse.square().sum(), leaves)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [Case(), Case(learn_table=False), Case(sinks=True, soft_cap=2.0, dropout=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(case: Case, dtype: torch.dtype) -> None:
    leaves, rest = problem(case, dtype)
    exact = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    expected, got = run(reference_attention, exact, rest), run(biased_attention, leaves, rest)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name in expected:
        if name != "y":  # the upstream gradient is drawn in y's dtype
            continue
        assert got[name].dtype == dtype
        assert (got[name].double() - expected[name]).abs().max() <= bound * expected[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn_table", [True, False])
def test_lower_precision_gradients(dtype: torch.dtype, learn_table: bool) -> None:
    leaves, rest = problem(Case(learn_table=learn_table), dtype)
    exact = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    upstream = torch.randn(2, 150, 4, 8, dtype=torch.float64)
    grads = []
    for attention, inputs in ((reference_attention, exact), (biased_attention, leaves)):
        y_BTHV, _ = attention(**inputs, **rest)  # type: ignore[arg-type]
        learned = [leaf for leaf in inputs.values() if leaf.requires_grad]
        grads.append(torch.autograd.grad(y_BTHV, learned, upstream.to(y_BTHV.dtype)))
    for expected, got in zip(*grads, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= (3e-6 if dtype == torch.float32 else 3e-2) * expected.abs().max()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case",
    [
        Case(n_tokens=6, n_heads=2, n_key_heads=1, head_dim=3, value_dim=2, sinks=True, soft_cap=2.0, lse=True),
        Case(n_tokens=6, n_heads=2, n_key_heads=2, head_dim=3, value_dim=3, window=3, dropout=0.4),
        Case(n_tokens=5, n_heads=1, n_key_heads=1, head_dim=2, value_dim=2, learn_table=False),
    ],
)
def test_gradcheck(case: Case) -> None:
    leaves, rest = problem(case)
    names = list(leaves)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in biased_attention(**dict(zip(names, values, strict=True)), **rest) if x is not None)  # type: ignore[arg-type]

    torch.autograd.gradcheck(outputs, tuple(leaves.values()))


def test_reference_has_second_derivatives() -> None:
    leaves, rest = problem(Case(n_tokens=4, n_heads=1, n_key_heads=1, head_dim=2, value_dim=2, sinks=True))
    names = list(leaves)
    torch.autograd.gradgradcheck(
        lambda *values: reference_attention(**dict(zip(names, values, strict=True)), **rest)[0],  # type: ignore[arg-type]
        tuple(leaves.values()),
    )


@pytest.mark.usefixtures("small_blocks")
def test_compiles_without_graph_breaks() -> None:
    case = Case(sinks=True, n_key_heads=2, dropout=0.1)
    leaves, rest = problem(case, torch.float32)
    query = replace(tokens(case)[0], start=7)
    rest |= {"query": query, "key": replace(query, index_T=query.index_T.clone())}
    expected = run(biased_attention, leaves, rest)
    compiled = torch.compile(biased_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    got = run(compiled, leaves, rest)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [True, False])
def test_gathered_shards_draw_the_same_dropout(packed: bool) -> None:
    case = Case(dropout=0.5, packed=packed)
    leaves, rest = problem(case)
    whole, _ = biased_attention(**leaves, **rest)  # type: ignore[arg-type]
    query, dropout = rest["query"], rest["dropout"]
    assert isinstance(query, AttentionTokens)
    assert isinstance(dropout, AttentionDropout)
    for part in (slice(0, 70), slice(70, 150)):
        shard = AttentionTokens(query.index_T[part], query.document_BT[:, part])
        for heads in (slice(0, 1), slice(1, 4)):
            local = {"q_BTHK": leaves["q_BTHK"][:, part, heads], "table_HN": leaves["table_HN"][heads]}
            local |= {name: leaves[name][:, :, heads] for name in ("k_BSGK", "v_BSGV")}
            draws = replace(dropout, first_head=dropout.first_head + heads.start)
            y_BTHV, _ = biased_attention(**local, **(rest | {"query": shard, "dropout": draws}))  # type: ignore[arg-type]
            torch.testing.assert_close(y_BTHV, whole[:, part, heads], rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean() -> None:
    query = AttentionTokens(torch.arange(64), torch.zeros(64, 64, dtype=torch.long))
    q_BTHK, v_BTHK = torch.zeros(64, 64, 4, 8), torch.ones(64, 64, 4, 8)
    dropout = AttentionDropout(0.25, 1, torch.arange(64), 0)
    y_BTHV, _ = biased_attention(q_BTHK, q_BTHK, v_BTHK, query=query, key=query, scale=1.0, dropout=dropout, packed=False)
    last_BH = y_BTHV[:, 63, :, 0]  # 64 equal probabilities: variance p / (1 - p) / 64
    assert abs(last_BH.mean().item() - 1.0) < 4 * math.sqrt(1 / 3 / 64 / 256)
    assert last_BH.var().item() == pytest.approx(1 / 3 / 64, rel=0.35)


def test_fixed_table_and_plain_paths_agree_with_sdpa() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 16, dtype=torch.float64) for _ in range(3))
    query = AttentionTokens(torch.arange(300), torch.zeros(2, 300, dtype=torch.long))
    y, _ = biased_attention(q, k, v, query=query, key=query, scale=0.25, packed=False)
    zero, _ = biased_attention(q, k, v, query=query, key=query, scale=0.25, packed=False, table_HN=torch.zeros(4, 300))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(zero, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_short_table_is_an_error(contiguous: bool, causal: bool) -> None:
    q = torch.randn(1, 200, 2, 8)
    query = AttentionTokens(torch.arange(200), torch.zeros(1, 200, dtype=torch.long))
    table = torch.zeros(2, 150 if causal else 299)
    with pytest.raises(ValueError, match="150 distances does not reach 199 tokens"):
        biased_attention(q, q, q, query=query, key=query, scale=1.0, table_HN=table, contiguous=contiguous, causal=causal)
    y, _ = biased_attention(q, q, q, query=query, key=query, scale=1.0, table_HN=table, contiguous=contiguous, causal=causal, window=150)
    assert y.isfinite().all()


def test_wrong_arguments_are_errors() -> None:
    q = torch.randn(1, 4, 2, 8)
    query = AttentionTokens(torch.arange(4), torch.zeros(1, 4, dtype=torch.long))

    def call(k: Tensor = q, window: int | None = None, soft_cap: float | None = None, table: Tensor | None = None) -> None:
        biased_attention(q, k, q, query=query, key=query, scale=1.0, window=window, soft_cap=soft_cap, table_HN=table)

    with pytest.raises(ValueError, match="are not"):
        call(k=torch.randn(1, 4, 2, 7))
    with pytest.raises(ValueError, match="window must be at least 1"):
        call(window=0)
    with pytest.raises(ValueError, match="soft_cap must be positive"):
        call(soft_cap=0.0)
    with pytest.raises(ValueError, match="dim 0 must be the 2 query heads"):
        call(table=torch.zeros(3, 4))


MEMORY = """
import torch
from benchmarks.measure import peak_memory_bytes
from titanarch.ops.biased_attention import AttentionTokens, biased_attention
torch.set_num_threads(1)
T, H, K = 16384, 6, 64
q, k, v = (torch.randn(1, T, H, K) for _ in range(3))
table = -torch.arange(T).float() * 2.0 ** -torch.arange(1, H + 1).float()[:, None]
query = AttentionTokens(torch.arange(T), torch.zeros(1, T, dtype=torch.long))
before = peak_memory_bytes()
y, _ = biased_attention(q, k, v, query=query, key=query, scale=K ** -0.5, table_HN=table, packed=False)
print(peak_memory_bytes() - before, y.isfinite().all().item())
"""


def test_16384_tokens_with_alibi_stay_under_two_gibibytes() -> None:
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=root).stdout.split()
    y_bytes = 16384 * 6 * 64 * 4
    assert y_bytes < int(output[0]) < 2 * 2**30, f"{int(output[0]) / 2**20:.0f} MiB"
    assert output[1] == "True"
