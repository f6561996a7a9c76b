"""The attention op against the attention of models that other people published (transformers)."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from titanarch.ops.biased_attention import AttentionTokens, biased_attention, reference_attention

B, T, H, G, K = 2, 48, 4, 2, 16


def projections(n_key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, T, H, K), torch.randn(B, T, n_key_heads, K), torch.randn(B, T, n_key_heads, K)


def tokens() -> AttentionTokens:
    return AttentionTokens(torch.arange(T), torch.zeros(B, T, dtype=torch.long))


def causal_mask(window: int = T) -> Tensor:
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)
    return torch.zeros(1, 1, T, T).masked_fill((distance_TT < 0) | (distance_TT >= window), torch.finfo(torch.float32).min)


def module(n_key_heads: int, sinks_H: Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=H // n_key_heads, sinks=sinks_H, training=False, head_dim=K)


@pytest.mark.parametrize("attention", [biased_attention, reference_attention])
@pytest.mark.parametrize("window", [None, 11])
def test_sinks_of_gpt_oss(attention: object, window: int | None) -> None:
    q, k, v = projections(G)
    sinks_H = torch.randn(H)
    expected, _ = gpt_oss_attention(module(G, sinks_H), *(x.transpose(1, 2) for x in (q, k, v)), causal_mask(window or T), scaling=0.3)
    y, _ = attention(q, k, v, query=tokens(), key=tokens(), scale=0.3, sinks_H=sinks_H, window=window)  # type: ignore[operator]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", [biased_attention, reference_attention])
def test_soft_cap_of_gemma2(attention: object) -> None:
    q, k, v = projections(G)
    expected, _ = gemma2_attention(module(G), *(x.transpose(1, 2) for x in (q, k, v)), causal_mask(), scaling=0.7, softcap=2.0)
    y, _ = attention(q, k, v, query=tokens(), key=tokens(), scale=0.7, soft_cap=2.0)  # type: ignore[operator]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", [biased_attention, reference_attention])
def test_alibi_of_bloom(attention: object) -> None:
    q, k, v = projections(H)
    alibi = build_alibi_tensor(torch.ones(B, T, dtype=torch.long), H, torch.float32).view(B, H, 1, T)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5 + alibi + causal_mask()
    expected = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)
    # Bloom adds slope j; softmax ignores the slope i of a row, which leaves -slope (i - j).
    slopes_H = alibi[0, :, 0, 1]
    table_HN = -slopes_H[:, None] * torch.arange(T)
    y, _ = attention(q, k, v, query=tokens(), key=tokens(), scale=K**-0.5, table_HN=table_HN)  # type: ignore[operator]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
