"""The rows of the parity matrix: small models, one for each registered component and each option of attention.

A component that is registered has a row without being named here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.channel import CHANNELS
from titanarch.contract.mixer import MIXERS, RecurrentMixer
from titanarch.contract.norm import NORMS
from titanarch.contract.position import ABSOLUTE_POSITIONS, RELATIVE_POSITIONS

Table = dict[str, Any]

D_MODEL, N_HEADS, D_FF, SEQ_LEN, VOCAB = 32, 4, 48, 32, 264
ODD_VOCAB = 257
"""Divided by no degree; as many rows as the byte tokenizer has tokens."""

BASE: Table = {
    "name": "decoder",
    "n_layers": 2,
    "d_model": D_MODEL,
    "n_heads": N_HEADS,
    "vocab_size": VOCAB,
    "channel": {"kind": "swiglu", "d_ff": D_FF},
    "init": {"std": 0.2},  # logits far enough from 0 that attention is not even
}


EBT: Table = {**BASE, "name": "ebt", "step_size": 0.2}  # with 1 a few updates make rounding visible: 6e-5 in the losses
EBT_KEYS = {"optimizer.lr_multipliers.step_size": 1.0}

HNET: Table = {key: value for key, value in BASE.items() if key != "n_layers"} | {"name": "hnet", "embedding_std": 0.2}

ENCODER_DECODER: Table = {key: value for key, value in BASE.items() if key != "n_layers"} | {
    "name": "encoder_decoder",
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "spans": {"n_sentinels": 6},
}


@dataclass(frozen=True)
class Row:
    """One model. ``model``: keys of [model] beside or instead of ``base``'s. ``imports``: modules that register what it names.

    ``reasons``: why a column (by glob) says nothing of it. ``base``: keys that rows of one model spec share. ``keys``: others of the
    configuration, dotted. ``bounds``: in fp32 by column (a glob), where rounding needs more than the column's.
    """

    name: str
    model: Table
    imports: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    base: Table = field(default_factory=lambda: BASE)
    keys: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        """The whole [model] table."""
        return {**self.base, **self.model}

    def reason(self, column: str) -> str | None:
        return next((reason for pattern, reason in self.reasons.items() if fnmatchcase(column, pattern)), None)

    def bound(self, column: str) -> float:
        """In fp32; 0 where the column's own holds."""
        return next((bound for pattern, bound in self.bounds.items() if fnmatchcase(column, pattern)), 0.0)


LAMBDA_BOUND = 5e-5
"""The gradient of lambda is one sum over all tokens, heads and channels, of terms that nearly cancel."""

SPANS = {"packing": "spans are drawn for rows whole, and documents alone stand in longer ones, where they draw others"}

DRAWS = {"packing": "draws are keyed by row and place in the row, and documents alone stand elsewhere"}

ROUTED = {
    "packing": "the router's losses are of all tokens of a row, and documents alone stand in longer ones",
    "float8*": "rounding to 8 bits sends tokens to other experts, and gradients jump with the choice",
}

EVERYTHING: Table = {
    "dropout": 0.1,
    "channel": {"kind": "swiglu", "d_ff": D_FF, "bias": True, "dropout": 0.1},
    "norm": {"kind": "layernorm"},
    "position": {"absolute": "scaled_sinusoidal", "relative": ["linear_cpb", "rotary"], "start_augmentation": 48},
    "mixers": {
        "attention": {
            "n_kv_heads": 2,
            "qk_norm": True,
            "sinks": True,
            "output_gate": True,
            "value_residual": "learned",
            "qkv_bias": True,
            "out_bias": True,
            "dropout": 0.1,
        }
    },
    "tied_head": True,
    "head_bias": True,
}


def attention(**options: Any) -> Table:
    """Attention with rotation and a bias by distance, so that neither is forgotten."""
    return {"mixers": {"attention": options}, "position": {"relative": ["rotary", "alibi"]}}


def rows() -> list[Row]:
    """All rows, in the order of the table."""
    return [*_positions(), *_mixers(), *_attention(), *_wiring(), *_heads_and_draws(), *_hierarchies(), *_encoder_decoders()]


def _positions() -> Iterator[Row]:
    for name in ABSOLUTE_POSITIONS:
        yield Row(f"absolute {name}", {"position": {"absolute": name}})
    for name in RELATIVE_POSITIONS:
        yield Row(f"relative {name}", {"position": {"relative": name}})
    yield Row("relative t5, a table a layer", {"position": {"relative": {"kind": "t5", "shared": False}}})
    yield Row("relative rotary, yarn", {"position": {"relative": _rotary("yarn", factor=4.0, original_length=16)}})
    yield Row("relative rotary + fourier_cpb", {"position": {"relative": ["rotary", "fourier_cpb"]}})


def _rotary(scaling: str, **options: Any) -> Table:
    return {"kind": "rotary", "scaling": {"kind": scaling, **options}}


RECURRENT_BOUNDS = {"float8*": 0.8, "*": 5e-5}
"""In fp32: a recurrence adds the same numbers up in another order where its state crosses processes. In float8: what is rounded goes
through gates and norms of single vectors, far from linear at weights of 0.2; 0.45 to 0.65 is seen, and 0.2 at weights of 0.05."""


def mixer_row(name: str, imports: tuple[str, ...] = ()) -> Row:
    """A registered mixer with its own defaults."""
    is_recurrent = name in MIXERS and issubclass(MIXERS[name], RecurrentMixer)
    return Row(f"mixer {name}", {"layers": [name]}, imports, bounds=RECURRENT_BOUNDS if is_recurrent else {})


def _mixers() -> Iterator[Row]:
    for name in MIXERS:
        if name not in ("attention", "external"):
            yield mixer_row(name)
    module = {"kind": "external", "module": "tests.parity.external:RunningMean", "arguments": {"width": "$d_model"}, "mix_documents": True}
    mixes = {"packing": "the module is told nothing of documents, and its user lets them mix"}
    yield Row("mixer external (LocalMixer)", {"layers": ["mean"], "mixers": {"mean": module}}, reasons=mixes)
    states = {"layers": ["gated_delta_net", "mamba2", "attention"], "n_layers": 3, "position": {"relative": "rotary"}, "init": {"std": 0.1}}
    yield Row("mixers gated_delta_net, mamba2, attention", states, bounds=RECURRENT_BOUNDS)
    hybrid = {"layers": ["attention", "mean"], "mixers": {"mean": module, "attention": {"n_kv_heads": 2}}}
    yield Row("mixers attention, external", hybrid, reasons=mixes)


def _attention() -> Iterator[Row]:
    yield Row("GQA, 2 key/value heads", attention(n_kv_heads=2))
    yield Row("MQA, 1 key/value head", attention(n_kv_heads=1))
    yield Row("head_dim other than d_model / n_heads", attention(head_dim=12))
    yield Row("window of 8", attention(window=8))
    yield Row("window of 20, beyond a part", attention(window=20, n_kv_heads=2))
    yield Row("soft cap", attention(soft_cap=4.0))
    yield Row("sinks", attention(sinks=True))
    yield Row("output gate", attention(output_gate=True))
    yield Row("QK-norm", attention(qk_norm=True))
    yield Row("value residual, half", attention(value_residual="half", n_kv_heads=2))
    yield Row("value residual, learned", attention(value_residual="learned", n_kv_heads=1))
    yield Row("biases on q, k, v and output", attention(qkv_bias=True, out_bias=True))
    nope = {"attention": {}, "nope": {"kind": "attention", "position": [], "n_kv_heads": 2}}
    yield Row("NoPE layers among rotary ones", {"layers": ["attention", "nope"], "mixers": nope, "position": {"relative": "rotary"}})
    local = {"local": {"kind": "attention", "window": 6}, "attention": {"n_kv_heads": 2}}
    both = {"position": {"relative": ["rotary", "alibi"]}}
    yield Row(
        "differential attention, GQA, rotary + alibi",
        {"layers": ["diff_attention"], "mixers": {"diff_attention": {"n_kv_heads": 2}}, **both},
        bounds={"*": LAMBDA_BOUND},
    )
    v2 = {"layers": ["diff_attention_v2"], "mixers": {"diff_attention_v2": {"n_kv_heads": 2}}}
    yield Row("differential attention 2, GQA, rotary + alibi", {**v2, **both})
    latent = {"q_rank": 48, "kv_rank": 32, "rotary_dim": 4, "value_dim": 16, "window": 20}
    yield Row("MLA, queries of rank 48, rotary + alibi", {"layers": ["mla"], "mixers": {"mla": latent}, **both})
    yield Row("window layers among whole ones", {"layers": ["local", "attention"], "mixers": local, "position": {"relative": "rotary"}})


def _wiring() -> Iterator[Row]:
    position = {"relative": "rotary"}
    for residual in ("post_norm", "sandwich", "parallel", "no_mixer_residual"):
        yield Row(f"residual {residual}", {"residual": residual, "position": position})
    for name in NORMS:
        yield Row(f"norm {name}", {"norm": {"kind": name}, "position": position, "init": {"std": 0.05} if name == "none" else BASE["init"]})
    for name in CHANNELS:
        has_hidden = "d_ff" in CHANNELS[name].Config.model_fields
        table = {"kind": name, **({"d_ff": D_FF} if has_hidden else {})}
        yield Row(f"channel {name}", {"channel": table, "position": position}, reasons=ROUTED if name == "moe" else {})
    experts = {"kind": "moe", "d_ff": 24, "n_shared": 2, "top_k": 3, "scores": "sigmoid", "scaling_factor": 1.5, "bias_rate": 1e-2}
    deepseek = {"channel_layers": ["channel", "experts"], "channels": {"experts": experts}, "position": position}
    yield Row("channel moe in every second block, with a bias and shared experts", deepseek, reasons=ROUTED)
    monarch = {"channel": {"kind": "swiglu", "d_ff": D_FF, "bias": True, "linear": "monarch"}, "position": position}
    yield Row("channel swiglu of monarch layers", monarch, keys={"optimizer.lr_multipliers.monarch": 0.5})
    for activation in ("isotropic", "elephant"):
        yield Row(f"activation {activation}", {"channel": {"kind": "mlp", "d_ff": D_FF, "activation": activation}, "position": position})
    values = {"layers": ["values_relu_attention"], "mixers": {"values_relu_attention": {"form": "first", "n_kv_heads": 2}}}
    yield Row("values through one layer, no channel mixer", {**values, "channel": "none", "position": position})


def _heads_and_draws() -> Iterator[Row]:
    position = {"relative": "alibi"}
    yield Row("tied head", {"tied_head": True, "position": position})
    yield Row("tied head with a bias, scaled embedding", {"tied_head": True, "head_bias": True, "scale_embedding": True})
    yield Row("odd vocabulary", {"vocab_size": ODD_VOCAB, "head_bias": True, "position": position})
    yield Row("odd vocabulary, tied head", {"vocab_size": ODD_VOCAB, "tied_head": True, "position": position})
    yield Row("soft cap of the logits", {"head_soft_cap": 3.0, "position": position})
    dropped = {**attention(dropout=0.1, n_kv_heads=2), "dropout": 0.1, "channel": {"kind": "swiglu", "d_ff": D_FF, "dropout": 0.1}}
    yield Row("dropout 0.1 everywhere", dropped, reasons=DRAWS)
    learned = {"absolute": {"kind": "learned", "max_length": 64}, "start_augmentation": 48}
    yield Row("start augmentation", {"position": learned}, reasons=DRAWS)
    # One process in fp32 is itself 6e-6 from float64 in this row's bias networks, whose gradients are sums that cancel.
    yield Row("everything at once", EVERYTHING, reasons=DRAWS, bounds={"CP2 ring": 2e-5})


def _stage(mixer: str, **options: Any) -> Table:
    return {"encoder": {"layers": [mixer]}, "decoder": {"layers": [mixer]}, **options}


def _hierarchies() -> Iterator[Row]:
    """H-Net."""
    main, position = {"layers": ["attention"], "n_layers": 2}, {"relative": "rotary"}
    counted = "the ratio loss of a micro-batch is of its own share of boundaries, which no sum over micro-batches gives"
    alone = "the ratio loss is of all tokens of a row, and documents alone stand in longer ones"
    decides = {"float8*": "rounding to 8 bits moves tokens over the threshold of the router, which decides and does not round"}
    one = {"stages": [_stage("attention", ratio=2.0)], "main": main, "position": position}
    yield Row("H-Net", one, reasons={"accumulation*": counted, "packing": alone, **decides}, base=HNET)
    stages = [_stage("mamba2", ratio=1.5, channel="none"), _stage("attention", ratio=1.5, d_model=48)]
    two = {"stages": stages, "main": {**main, "d_model": 64}, "position": position, "ratio_loss_weight": 0.0}
    yield Row("H-Net, two stages that widen, Mamba-2 ends, no ratio loss", two, reasons=decides, base=HNET)
    yield Row("EBT, S1", {"start": "zeros"}, base=EBT, keys=EBT_KEYS)
    thinking = {"detach": False, "loss": "last", "random_steps": 1, "random_step_scale": 2.0, "langevin_noise": 0.1}
    yield Row("EBT, S2", {**thinking, "mixer": {"n_kv_heads": 2}}, reasons=DRAWS, base=EBT, keys=EBT_KEYS)


def _encoder_decoders() -> Iterator[Row]:
    t5 = {"position": {"relative": "t5"}, "mixers": {"attention": {"scale": 1.0}}, "tied_head": True, "scale_head": True}
    yield Row("encoder-decoder, T5", {**t5, "init": {"scheme": "fan_in"}}, reasons=SPANS, base=ENCODER_DECODER)
    dropped = {"dropout": 0.1, "channel": {"kind": "mlp", "d_ff": D_FF, "dropout": 0.1}}
    mixers = {"attention": {"n_kv_heads": 2, "dropout": 0.1, "output_gate": True, "sinks": True}, "cross": {"position": "rotary"}}
    v2 = {**dropped, "mixers": mixers, "position": {"relative": "rotary"}, "spans": {"n_sentinels": 6, "density": 0.3, "mean_length": 2.0}}
    yield Row("encoder-decoder, rotary across too, grouped, dropout 0.1", v2, reasons=DRAWS, base=ENCODER_DECODER)
