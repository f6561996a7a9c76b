"""The encoder-decoder beside transformers' T5, given the same inputs of encoder and decoder.

A file of its own, since transformers is slow to import and the processes of distributed tests import a test's file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from tests.models.encoder_decoder_oracle import D_FF, START, D, H, V, built, rows
from titanarch.models.encoder_decoder.model import EncoderDecoder


def reference() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=V, d_model=D, d_kv=D // H, d_ff=D_FF, num_layers=2, num_decoder_layers=3, num_heads=H, dropout_rate=0.0,
        feed_forward_proj="relu", tie_word_embeddings=True, decoder_start_token_id=START,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double().eval()


def counterparts(model: EncoderDecoder, t5: T5ForConditionalGeneration) -> list[tuple[Tensor, Tensor]]:
    """Parameters of both by pairs; tables of T5 as they lie here, transposed."""
    mine, its = dict(model.named_parameters()), dict(t5.named_parameters())
    names = {"embedding.weight": "shared.weight", "final_norm.weight": "decoder.final_layer_norm.weight"}
    names["encoder_norm.weight"] = "encoder.final_layer_norm.weight"
    for stack, n_layers in (("encoder", 2), ("decoder", 3)):
        for layer in range(n_layers):
            here, there = f"{stack}.{layer}", f"{stack}.block.{layer}.layer"
            parts = [("mixer", "0.SelfAttention", "norms.mixer_norm", "0")]
            if stack == "decoder":
                parts.append(("cross", "1.EncDecAttention", "cross_norms.0", "1"))
            for part, its_part, norm, number in parts:
                names |= {f"{here}.{part}.w{p}.weight": f"{there}.{its_part}.{p}.weight" for p in "qkvo"}
                names[f"{here}.{norm}.weight"] = f"{there}.{number}.layer_norm.weight"
            last = len(parts)
            names |= {f"{here}.channel.up.weight": f"{there}.{last}.DenseReluDense.wi.weight"}
            names |= {f"{here}.channel.down.weight": f"{there}.{last}.DenseReluDense.wo.weight"}
            names[f"{here}.norms.channel_norm.weight"] = f"{there}.{last}.layer_norm.weight"
        names[f"{stack}.0.mixer.position.0.table_HS"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert names.keys() == mine.keys(), sorted(names.keys() ^ mine.keys())
    assert set(names.values()) == its.keys(), sorted(set(names.values()) ^ its.keys())
    return [(mine[name], its[other]) for name, other in names.items()]


def close_to(found: Tensor, expected: Tensor) -> bool:
    """Within 1e-6 of the largest; T5's own code takes norms and softmax in fp32."""
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


def test_t5_has_the_same_logits_and_gradients() -> None:
    model, t5 = built(), reference()
    pairs, generator = counterparts(model, t5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, its in pairs:
            mine.add_(torch.randn(mine.shape, generator=generator, dtype=torch.float64), alpha=0.1)
            its.copy_(mine if mine.shape == its.shape else mine.T)
    tokens, seq = rows(3, seed=5)
    found = model._corrupted(tokens, seq, tokens)
    assert found.tokens_BS.shape == (3, 57)
    logits = t5(input_ids=found.tokens_BS, decoder_input_ids=found.inputs_BU).logits
    assert close_to(model.logits(tokens, seq), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), found.labels_BU.flatten(), reduction="sum")
    objective = model(tokens, seq, tokens)
    assert (int(objective.n_targets), model.count_targets(tokens, seq)) == (39, 39)
    assert close_to(objective.total, expected)
    found_gradients = torch.autograd.grad(objective.total, [mine for mine, _ in pairs])
    its_gradients = torch.autograd.grad(expected, [its for _, its in pairs])
    for a, b in zip(found_gradients, its_gradients, strict=True):
        assert b.abs().max() > 1e-3
        assert close_to(a, b if a.shape == b.shape else b.T)
