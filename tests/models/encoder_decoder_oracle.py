"""Small encoder-decoders, T5's noise mask, and span corruption by a loop."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.models.materialize import materialized
from titanarch.contract.model import MODELS
from titanarch.contract.sequence import SequenceInfo
from titanarch.models.encoder_decoder.config import EncoderDecoderConfig
from titanarch.models.encoder_decoder.model import EncoderDecoder

D, H, D_FF, V, T = 32, 4, 48, 96, 64
N_SENTINELS = 10
FIRST_SENTINEL, START = V - 1 - N_SENTINELS, V - 1
TABLE: dict[str, Any] = {
    "name": "encoder_decoder",
    "d_model": D,
    "n_heads": H,
    "n_encoder_layers": 2,
    "n_decoder_layers": 3,
    "vocab_size": V,
    "norm": {"kind": "rmsnorm", "eps": 1e-6},
    "channel": {"kind": "mlp", "activation": "relu", "d_ff": D_FF},
    "position": {"relative": "t5"},
    "mixers": {"attention": {"scale": 1.0}},
    "spans": {"n_sentinels": N_SENTINELS},
    "tied_head": True,
    "scale_head": True,
    "init": {"scheme": "fan_in"},
}


def config_of(**keys: Any) -> EncoderDecoderConfig:
    config = MODELS.resolve({**TABLE, **keys})
    assert isinstance(config, EncoderDecoderConfig)
    return config


def built(**keys: Any) -> EncoderDecoder:
    config = config_of(**keys)
    return materialized(lambda: EncoderDecoder(config, V, T), scheme=config.init.scheme).double()


def rows(n_rows: int, *, lengths: tuple[int, ...] = (T,), seed: int | None = None) -> tuple[Tensor, SequenceInfo]:
    """Tokens and their sequences; every row has documents of these lengths."""
    tokens_BT = torch.randint(FIRST_SENTINEL, (n_rows, T), generator=torch.Generator().manual_seed(1))
    whole = len(lengths) == 1
    return tokens_BT, SequenceInfo.whole(n_rows, T, seed=seed) if whole else SequenceInfo.of_lengths([lengths] * n_rows, seed=seed)


def noise_mask(length: int, density: float, mean_length: float, generator: np.random.Generator) -> np.ndarray:
    """T5's definition (text-to-text-transfer-transformer, random_spans_noise_mask), bool [length]."""
    n_noise = int(np.clip(int(np.round(length * density)), 1, length - 1))
    n_spans = max(int(np.round(n_noise / mean_length)), 1)

    def segmentation(n_items: int) -> np.ndarray:
        is_first = np.arange(n_items - 1) < n_spans - 1
        generator.shuffle(is_first)
        return np.bincount(np.concatenate([[0], np.cumsum(is_first)]), minlength=n_spans)

    noise, other = segmentation(n_noise), segmentation(length - n_noise)
    parts = np.stack([other, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * n_spans) % 2 == 1, parts)


def corrupted_by_a_loop(tokens: list[int], noise: list[bool], documents: list[int]) -> dict[str, list[Any]]:
    """One row: what encoder and decoder read with the document of each, labels, and the tokens they belong to."""
    out: dict[str, list[Any]] = {name: [] for name in ("encoder", "encoder documents", "inputs", "labels", "documents", "places")}
    n_sentinels, last_target, span_document = dict.fromkeys(documents, 0), dict.fromkeys(documents, START), None
    for place, (token, is_noise, document) in enumerate(zip(tokens, noise, documents, strict=True)):
        targets = [token]
        if not is_noise:
            span_document = None
            out["encoder"].append(token)
            out["encoder documents"].append(document)
            continue
        if span_document is None:
            span_document, sentinel = document, FIRST_SENTINEL + n_sentinels[document]
            n_sentinels[document] += 1
            out["encoder"].append(sentinel)
            out["encoder documents"].append(document)
            targets = [sentinel, token]
        for target in targets:
            is_cut = document != span_document
            out["labels"].append(-100 if is_cut else target)
            out["inputs"].append(None if is_cut else last_target[document])
            out["documents"].append(None if is_cut else document)
            out["places"].append(place)
            if not is_cut:
                last_target[document] = target
    return out
