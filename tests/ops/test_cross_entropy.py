"""The chunked cross-entropy against F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanarch.ops.cross_entropy import IGNORED, chunked_cross_entropy, reference_cross_entropy, token_cross_entropy


def inputs(n_tokens: int, n_dims: int, vocabulary: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(n_tokens, n_dims, dtype=dtype), torch.randn(vocabulary, n_dims, dtype=dtype)
    bias_V, labels_N = torch.randn(vocabulary, dtype=dtype), torch.randint(vocabulary, (n_tokens,))
    labels_N[::5] = IGNORED
    return *(x.requires_grad_() for x in (hidden_ND, weight_VD, bias_V)), labels_N


def independent(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, soft_cap: float | None, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, loss sum, z sum, over the valid tokens alone."""
    valid_N = labels_N != IGNORED
    logits = F.linear(hidden_ND[valid_N], weight_VD, bias_V)
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    loss, z = F.cross_entropy(logits, labels_N[valid_N], reduction="sum"), (logits.exp().sum(-1).log() ** 2).sum()
    return loss + z_weight * z, loss, z


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 23, 100])
@pytest.mark.parametrize(("soft_cap", "z_weight", "biased"), [(None, 0.0, True), (None, 0.3, False), (2.5, 0.1, True)])
def test_losses_and_gradients_in_float64(chunk_tokens: int | None, soft_cap: float | None, z_weight: float, biased: bool) -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(23, 5, 37)
    bias = bias_V if biased else None
    leaves = [hidden_ND, weight_VD, *([bias_V] if biased else [])]
    total, loss, z = independent(hidden_ND, weight_VD, bias, labels_N, soft_cap, z_weight)
    expected = torch.autograd.grad(0.7 * total, leaves)
    got = chunked_cross_entropy(hidden_ND, weight_VD, bias, labels_N, soft_cap=soft_cap, z_weight=z_weight, chunk_tokens=chunk_tokens)
    for left, right in ((got.total, total), (got.loss_sum, loss), (got.z_sum, z)):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-12, atol=1e-12)
    assert got.count.item() == (labels_N != IGNORED).sum().item()
    assert [x.requires_grad for x in (got.loss_sum, got.z_sum, got.count)] == [False, False, False]
    for left, right in zip(torch.autograd.grad(0.7 * got.total, leaves), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    reference = reference_cross_entropy(hidden_ND, weight_VD, bias, labels_N, soft_cap=soft_cap, z_weight=z_weight)
    torch.testing.assert_close(reference.total, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_tokens", [0, 6])
def test_no_valid_target_gives_zeros(n_tokens: int) -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(n_tokens, 3, 11)
    labels_N.fill_(IGNORED)
    got = chunked_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N, z_weight=0.5)
    assert (got.total.item(), got.loss_sum.item(), got.z_sum.item(), got.count.item()) == (0.0, 0.0, 0.0, 0)
    for grad in torch.autograd.grad(got.total, (hidden_ND, weight_VD, bias_V)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_extreme_logits_stay_finite() -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(9, 4, 13, dtype=torch.float32)
    got = chunked_cross_entropy(hidden_ND * 1e4, weight_VD, bias_V, labels_N, chunk_tokens=4)
    expected = F.cross_entropy(F.linear(hidden_ND * 1e4, weight_VD, bias_V), labels_N, reduction="sum")
    torch.testing.assert_close(got.total, expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got.total, (hidden_ND, weight_VD, bias_V)))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(8, 4, 9)
    frozen = weight_VD.detach()
    got = chunked_cross_entropy(hidden_ND, frozen, bias_V.detach(), labels_N)
    expected = independent(hidden_ND, frozen, bias_V.detach(), labels_N, None, 0.0)[0]
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden_ND)[0] for x in (got.total, expected)))
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N).total.requires_grad


def test_bfloat16_sums_in_float32() -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(64, 32, 101, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    expected = independent(*exact, labels_N, None, 0.0)[0]
    got = chunked_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens=10)
    assert got.total.dtype == torch.float32
    assert got.total.item() == pytest.approx(expected.item(), rel=2e-3)
    grads = torch.autograd.grad(got.total, (hidden_ND, weight_VD, bias_V))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_losses_of_single_tokens(soft_cap: float | None, chunk_tokens: int | None) -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(21, 6, 19)
    logits = F.linear(hidden_ND, weight_VD, bias_V).detach()
    logits = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    expected = F.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="none")
    got = token_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N, soft_cap=soft_cap, chunk_tokens=chunk_tokens)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert token_cross_entropy(hidden_ND[:0], weight_VD, None, labels_N[:0]).shape == (0,)
    assert token_cross_entropy(hidden_ND.bfloat16(), weight_VD.bfloat16(), None, labels_N).dtype == torch.float32


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(40, 4, 50)
    rows = []
    plain = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: rows.append(x.shape[0]) or plain(x, dim))
    chunked_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens=16).total.backward()
    assert rows == [16, 16, 8]


def test_compiles_without_graph_breaks() -> None:
    hidden_ND, weight_VD, bias_V, labels_N = inputs(10, 4, 15)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, weight, bias, labels_N, chunk_tokens=4, z_weight=0.1).total

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    results = [
        (loss := f(hidden_ND, weight_VD, bias_V), *torch.autograd.grad(loss, (hidden_ND, weight_VD, bias_V))) for f in (total, compiled)
    ]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(9, 5)}, r"\[N, D\]"),
        ({"bias_V": torch.zeros(8)}, r"bias must be \[9\]"),
        ({"chunk_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_errors(change: dict[str, object], message: str) -> None:
    arguments = {"hidden_ND": torch.zeros(3, 4), "weight_VD": torch.zeros(9, 4), "bias_V": None, "labels_N": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**(arguments | change))  # type: ignore[arg-type]
