"""The CUDA path's formula, run by FlexAttention's eager implementation on the CPU, and the op itself on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module

from tests.ops.attention_cases import Case, problem, run, tokens
from titanarch.ops import _attention_flex
from titanarch.ops import biased_attention as op
from titanarch.ops.biased_attention import AttentionTokens, biased_attention, reference_attention

FLEX = {
    "learned": Case(),
    "one document, gqa": Case(packed=False, n_key_heads=2),
    "heads that do not divide": Case(n_heads=3, n_key_heads=2),
    "window, cap, sinks, lse": Case(window=20, soft_cap=2.0, sinks=True, lse=True, table=False),
    "other value dim": Case(value_dim=16, head_dim=32),
    "bidirectional": Case(causal=False, window=60),
    "shuffled shard": Case(order="shuffled", queries=(20, 140)),
}


@pytest.mark.parametrize("case", FLEX.values(), ids=FLEX)
def test_the_formula_on_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)  # allows its eager backward
    leaves, rest = problem(case)
    expected = run(reference_attention, leaves, rest)
    monkeypatch.setattr(_attention_flex, "fits", lambda *arguments: True)
    got = run(biased_attention, leaves, rest)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name].to(got[name].dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 130), (False, None), (False, 200)])
@pytest.mark.parametrize("queries", [None, (300, 620)])
def test_block_mask_is_what_the_pairs_say(
    order: str, packed: bool, causal: bool, window: int | None, queries: tuple[int, int] | None
) -> None:
    case = Case(n_tokens=700, order=order, queries=queries)
    query, key = tokens(case)
    options = {"causal": causal, "packed": packed, "window": window}
    mask = _attention_flex.block_mask(query, key, **options, n_rows=2)  # type: ignore[arg-type]
    visible = _attention_flex.mask_function(query, key, **options)  # type: ignore[arg-type]
    rows, t, s = torch.arange(2)[:, None, None], torch.arange(len(query.index_T))[None, :, None], torch.arange(700)[None, None]
    pairs = visible(rows, rows, t, s).expand(2, -1, -1)
    n_blocks = (-(-len(query.index_T) // 128), 6)
    some, every = torch.zeros(2, *n_blocks, dtype=torch.bool), torch.zeros(2, *n_blocks, dtype=torch.bool)
    for b in range(2):
        for i in range(n_blocks[0]):
            for j in range(n_blocks[1]):
                block = pairs[b, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                some[b, i, j], every[b, i, j] = block.any(), block.all()
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = listed(mask.kv_num_blocks, mask.kv_indices, n_blocks)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, n_blocks)
    assert not (partial & full).any()
    assert not (full & ~every).any(), "a block that is not wholly visible is taken as such"
    assert not (some & ~(partial | full)).any(), "a block with visible pairs is left out"
    if order == "contiguous" and not packed:
        assert torch.equal(full, every)
        assert torch.equal(partial | full, some)


def listed(n_BHP: Tensor, index_BHPJ: Tensor, n_blocks: tuple[int, int]) -> Tensor:
    """The blocks [2, P, J] that counts and indices name."""
    chosen = torch.zeros(2, *n_blocks, dtype=torch.bool)
    for b in range(2):
        for i in range(n_blocks[0]):
            row = min(b, n_BHP.shape[0] - 1)
            chosen[b, i, index_BHPJ[row, 0, i, : n_BHP[row, 0, i]].long()] = True
    return chosen


def on_gpu(leaves: dict[str, Tensor], rest: dict[str, object], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, object]]:
    moved = {name: leaf.detach().to("cuda", dtype).requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    sides = {side: AttentionTokens(rest[side].index_T.cuda(), rest[side].document_BT.cuda()) for side in ("query", "key")}  # type: ignore[attr-defined]
    return moved, rest | sides


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [Case(head_dim=64, value_dim=64), *FLEX.values()])
def test_on_a_gpu(case: Case) -> None:
    if case.head_dim < 16:
        case = Case(**{**vars(case), "head_dim": 32, "value_dim": 32})
    leaves, rest = problem(case)
    expected = run(reference_attention, leaves, rest)
    for dtype, bound in ((torch.float32, 5e-3), (torch.bfloat16, 5e-2)):
        y, _ = biased_attention(*(), **on_gpu(leaves, rest, dtype)[0], **on_gpu(leaves, rest, dtype)[1])  # type: ignore[arg-type]
        assert (y.cpu().double() - expected["y"]).abs().max() <= bound * expected["y"].abs().max()


def test_the_gpu_path_is_for_gpus() -> None:
    q = torch.randn(1, 4, 2, 16)
    assert not _attention_flex.fits(q, q, None)
    assert op._softmax_dtype(q) == torch.float32
