"""The chunked delta rule against its definition, token by token, and against transformers' recurrences."""

import inspect
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from titanarch.ops._delta_kernels import by_documents
from titanarch.ops.delta_recurrence import (
    delta_rule,
    delta_rule_transition,
    diagonal_plus_low_rank,
    diagonal_plus_low_rank_transition,
    naive_recurrence,
)

B, H, K, V = 2, 3, 8, 6


def operands(T: int, decays: int, dtype: torch.dtype = torch.float64, strength: float = 0.1) -> list[Tensor]:
    """q, k, v, log decay [B, T, H, ``decays``], beta; leaves that want gradients."""
    g = torch.Generator().manual_seed(T + decays)
    q, k = (torch.randn(B, T, H, K, generator=g, dtype=dtype) for _ in range(2))
    v = torch.randn(B, T, H, V, generator=g, dtype=dtype)
    log_decay = -strength * F.softplus(torch.randn(B, T, H, decays, generator=g, dtype=dtype))
    beta = torch.rand(B, T, H, generator=g, dtype=dtype)
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, log_decay, beta)]


def as_general(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """The delta rule in the general form."""
    g, b = log_decay.expand_as(k), beta[..., None] * k
    return q, b, v, g, -torch.exp(g) * k, b


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], leaves: list[Tensor], tolerance: float) -> None:
    """Outputs, final states and the gradients of ``leaves`` by a weighted sum of both."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
    results = []
    for pair in (found, expected):
        loss = sum((x * w).sum() for x, w in zip(pair, weights, strict=True))
        results.append((*pair, *torch.autograd.grad(loss, leaves, retain_graph=True)))
    for x, y in zip(*results, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("T", [1, 7, 64, 150])
@pytest.mark.parametrize("decays", [1, K])
def test_chunks_equal_the_definition(T: int, decays: int) -> None:
    leaves = operands(T, decays)
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.05
    state = torch.randn(B, H, V, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = naive_recurrence(*as_general(*leaves), starts_BT=starts, state=state)
    assert_same(delta_rule(*leaves, starts_BT=starts, state=state), expected, [*leaves, state], 1e-13)
    general = diagonal_plus_low_rank(*as_general(*leaves), starts_BT=starts, state=state)
    assert_same(general, expected, [*leaves, state], 1e-13)


@pytest.mark.parametrize("decays", [1, K])
@pytest.mark.parametrize("with_start", [False, True])
def test_a_shard_is_one_map_of_the_state(decays: int, *, with_start: bool) -> None:
    leaves = operands(90, decays)
    starts = torch.zeros(B, 90, dtype=torch.bool)
    starts[0, 70] = with_start
    state = torch.randn(B, H, V, K, dtype=torch.float64).requires_grad_()
    _, expected = naive_recurrence(*as_general(*leaves), starts_BT=starts, state=state)
    M, P = delta_rule_transition(*leaves[1:], starts_BT=starts)
    M_general, P_general = diagonal_plus_low_rank_transition(*as_general(*leaves)[1:], starts_BT=starts)
    for multiplied, added in ((M, P), (M_general, P_general)):
        assert_same((state @ multiplied + added, added), (expected, P), [*leaves[1:], state], 1e-13)
    assert (M[0] == 0).all() == with_start
    assert (M_general[0] == 0).all() == with_start


@pytest.mark.parametrize("decays", [1, K])
def test_documents_of_a_row_equal_documents_alone(decays: int) -> None:
    leaves = [x.detach() for x in operands(100, decays)]
    starts = torch.zeros(B, 100, dtype=torch.bool)
    starts[:, [0, 37, 64]] = True
    y, last = delta_rule(*leaves, starts_BT=starts, state=torch.ones(B, H, V, K))
    for first, end in ((0, 37), (37, 64), (64, 100)):
        alone, state = delta_rule(*(x[:, first:end] for x in leaves), starts_BT=None, state=None)
        torch.testing.assert_close(y[:, first:end], alone, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(last, state, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("decays", [1, K])
def test_decays_that_underflow_stay_exact_in_fp32(decays: int) -> None:
    """Sums of log decays of -10^5 a chunk: differences of prefix sums would lose all digits of the small ones."""
    leaves = [x.detach() for x in operands(128, decays, torch.float32, strength=4.0)]
    leaves[3][:, ::3] = -5000.0
    exact, _ = naive_recurrence(*as_general(*(x.double() for x in leaves)), starts_BT=None, state=None)
    for y, _ in (
        delta_rule(*leaves, starts_BT=None, state=None),
        diagonal_plus_low_rank(*as_general(*leaves), starts_BT=None, state=None),
    ):
        assert (y.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_low_precision_streams_keep_a_wide_state() -> None:
    leaves = [x.detach().bfloat16() for x in operands(70, 1)]
    y, state = delta_rule(*leaves, starts_BT=None, state=None)
    wide, _ = delta_rule(*(x.float() for x in leaves), starts_BT=None, state=None)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, wide.bfloat16(), rtol=0, atol=0)


def test_the_gradient_can_be_differentiated() -> None:
    leaves = [x[:1, :, :1].detach().requires_grad_() for x in operands(3, 1)]

    def energy(k: Tensor) -> Tensor:
        return delta_rule(leaves[0], k, *leaves[2:], starts_BT=None, state=None)[0].square().sum()

    assert torch.autograd.gradgradcheck(energy, (leaves[1],))


class InFloat64(SimpleNamespace):
    """torch as a module sees it, but for float32, which is float64: the reference computes in float32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.mark.parametrize(
    ("module", "name", "decays"),
    [
        (modeling_qwen3_next, "torch_recurrent_gated_delta_rule", 1),
        (modeling_kimi_linear, "recurrent_kimi_delta_attention", K),
    ],
)
def test_delta_rule_equals_transformers(module: ModuleType, name: str, decays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, log_decay, beta = leaves = operands(33, decays)
    state = torch.randn(B, H, V, K, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr(module, "torch", InFloat64())
    theirs, last = inspect.unwrap(getattr(module, name))(
        q * K**0.5, k, v, log_decay.squeeze(-1) if decays == 1 else log_decay, beta, initial_state=state.mT, output_final_state=True
    )
    assert_same(delta_rule(q, k, v, log_decay, beta, starts_BT=None, state=state), (theirs, last.mT), [*leaves, state], 1e-12)


def kernel_of_documents(
    *, cu_seqlens: Tensor | None = None, scale: float, initial_state: Tensor, output_final_state: bool, **x: Tensor
) -> tuple[Tensor, Tensor]:
    """What a kernel for documents of any length promises, by the definition: states [N, H, K, V], one document after another."""
    assert (scale, output_final_state) == (1.0, True)
    operands = [x[name] for name in ("q", "k", "v", "g", "a", "b")]
    if cu_seqlens is None:
        y, last = naive_recurrence(*operands, starts_BT=None, state=initial_state.mT)
        return y, last.mT
    parts = [
        naive_recurrence(*(z[:, first:end] for z in operands), starts_BT=None, state=initial_state[n : n + 1].mT)
        for n, (first, end) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts]).mT


@pytest.mark.parametrize("starts_at", [None, [(0, 0), (0, 5), (1, 3)], [(1, 0), (1, 19)], []])
def test_kernels_of_documents_are_given_rows(starts_at: list[tuple[int, int]] | None) -> None:
    """Documents inside rows, and rows that go on from the incoming state."""
    tensors = [x.detach() for x in as_general(*operands(20, K, torch.float32))]
    starts = None if starts_at is None else torch.zeros(B, 20, dtype=torch.bool)
    for row, token in starts_at or ():
        starts[row, token] = True
    state = torch.randn(B, H, V, K)
    streams = dict(zip(("q", "k", "v", "g", "a", "b"), tensors, strict=True))
    y, last = by_documents(kernel_of_documents, streams, starts, state)
    y_expected, expected = naive_recurrence(*tensors, starts_BT=starts, state=state)
    torch.testing.assert_close(y, y_expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("decays", [1, 64])
def test_kernels_equal_the_plain_form(decays: int) -> None:
    pytest.importorskip("fla")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, 2, 64, generator=generator) for _ in range(3))
    log_decay, beta = -0.5 * torch.rand(2, 200, 2, decays, generator=generator), torch.rand(2, 200, 2, generator=generator)
    starts = torch.zeros(2, 200, dtype=torch.bool)
    starts[:, [0, 70]] = True
    leaves = [x.cuda().requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_decay, beta)]
    expected = delta_rule(*leaves, starts_BT=starts.cuda(), state=None)
    assert_same(delta_rule(*leaves, starts_BT=starts.cuda(), state=None, backend="fla"), expected, leaves, 1e-2)
    if decays > 1:
        general = diagonal_plus_low_rank(*as_general(*leaves), starts_BT=starts.cuda(), state=None, backend="fla")
        assert_same(general, expected, leaves, 1e-2)
