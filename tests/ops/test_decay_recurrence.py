"""The chunked decaying recurrences against their definition, token by token, and against one matrix over all tokens."""

import pytest
import torch
from torch import Tensor

from titanarch.ops._decay_chunks import states_between
from titanarch.ops.decay_recurrence import decay_recurrence, decay_recurrence_naive, decay_transition

B, K, V = 2, 5, 6


def operands(T: int, H: int, G: int, *, vector: bool, strength: float = 1.0) -> list[Tensor]:
    """q, k, v, log decay and the incoming state; leaves that want gradients."""
    g = torch.Generator().manual_seed(T + H)
    shapes = [(B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H, K) if vector else (B, T, H), (B, H, K, V)]
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    leaves[3] = -strength * leaves[3].abs()
    return [x.requires_grad_() for x in leaves]


def starts_of(T: int) -> Tensor:
    """Documents of about ten tokens; row 0 goes on with what came before."""
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.1
    starts[0, 0], starts[1, 0] = False, True
    return starts


def with_gradients(result: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, the final state, and the gradients of ``leaves`` by a weighted sum of both."""
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in result]
    loss = sum((x * w).sum() for x, w in zip(result, weights, strict=True))
    return [*result, *torch.autograd.grad(loss, leaves, retain_graph=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.isfinite().all(), f"result {number}"
        assert (x - y).abs().max() <= tolerance * y.abs().max(), f"result {number}"


@pytest.mark.parametrize(("H", "G", "vector"), [(4, 4, False), (4, 2, False), (4, 1, False), (3, 2, False), (4, 4, True)])
@pytest.mark.parametrize(("T", "chunk_size"), [(1, 16), (37, 8), (37, 64), (150, 4)])
def test_chunks_equal_the_definition(H: int, G: int, *, vector: bool, T: int, chunk_size: int) -> None:
    """150 tokens in chunks of 4 are more chunks than one loop hands the state through."""
    leaves, starts = operands(T, H, G, vector=vector), starts_of(T)
    expected = decay_recurrence_naive(*leaves[:4], starts_BT=starts, state=leaves[4])
    found = decay_recurrence(*leaves[:4], starts_BT=starts, state=leaves[4], chunk_size=chunk_size)
    assert_same(with_gradients(found, leaves), with_gradients(expected, leaves), 1e-12)


@pytest.mark.parametrize("vector", [False, True])
def test_one_document_equals_one_matrix_of_decays(*, vector: bool) -> None:
    """y_t = sum_s sum_k q_tk k_sk exp(decays after s up to t) v_s, written out, and the derivative of that by autograd."""
    T, H = 21, 3
    leaves = operands(T, H, H, vector=vector)[:4]
    q, k, v, g = leaves
    log_decay = g if vector else g[..., None].expand(B, T, H, K)
    after = log_decay.cumsum(1)
    between = after[:, :, None] - after[:, None]
    kept = between.masked_fill(torch.ones(T, T).triu(1).bool()[None, :, :, None, None], -torch.inf).exp()
    y = torch.einsum("bthk,bshk,btshk,bshv->bthv", q, k, kept, v)
    last = torch.einsum("bshk,bshk,bshv->bhkv", k, kept[:, -1], v)
    found = decay_recurrence(*leaves, starts_BT=None, state=None, chunk_size=8)
    assert_same(with_gradients(found, leaves), with_gradients((y, last), leaves), 1e-12)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 60.0])
def test_fp32_is_accurate_and_finite_at_any_decay(*, vector: bool, strength: float) -> None:
    """A log decay of -60 a token has ratios within a chunk far beyond what fp32 holds."""
    exact = operands(256, 2, 2, vector=vector, strength=strength)
    leaves = [x.detach().float().requires_grad_() for x in exact]
    starts = starts_of(256)
    found = decay_recurrence(*leaves[:4], starts_BT=starts, state=leaves[4], chunk_size=64)
    expected = decay_recurrence_naive(*exact[:4], starts_BT=starts, state=exact[4])
    assert_same(with_gradients(found, leaves), with_gradients(expected, exact), 3e-6)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("with_start", [False, True])
def test_a_shard_is_one_map_of_the_state(*, vector: bool, with_start: bool) -> None:
    leaves = operands(40, 2, 2, vector=vector)
    starts = torch.zeros(B, 40, dtype=torch.bool)
    starts[0, 30] = with_start
    decay, added = decay_transition(*leaves[1:4], starts_BT=starts)
    y, last = decay_recurrence_naive(*leaves[:4], starts_BT=starts, state=leaves[4])
    assert_same(with_gradients((y, decay * leaves[4] + added), leaves), with_gradients((y, last), leaves), 1e-12)


def test_states_between_many_chunks_are_handed_on_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    added, decay = torch.randn(2, 300, 3, generator=g, dtype=torch.float64), torch.rand(2, 300, 1, generator=g, dtype=torch.float64)
    state = torch.randn(2, 3, generator=g, dtype=torch.float64)
    before, last = states_between(added, decay, state)
    for number in range(300):
        torch.testing.assert_close(before[:, number], state, rtol=1e-12, atol=1e-14)
        state = decay[:, number] * state + added[:, number]
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-14)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    leaves = [x.detach().bfloat16() for x in operands(64, 2, 2, vector=False, strength=0.01)]
    y, last = decay_recurrence(*leaves[:4], starts_BT=None, state=leaves[4], chunk_size=16)
    expected, _ = decay_recurrence_naive(*[x.double() for x in leaves[:4]], starts_BT=None, state=leaves[4].double())
    assert y.dtype == last.dtype == torch.float32
    assert (y - expected).abs().max() <= 3e-6 * expected.abs().max()
