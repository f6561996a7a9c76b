"""Named sizes of the decoder, and how a [model] table is completed from them.

xsmall to xlarge are the sizes of the position study (layers / width / heads 4/256/4 to 16/1024/16); march_36m that of
the march notes; gpt_* follow GPT-2 and GPT-3 (arXiv:2005.14165, table 2.1); llama3_* the Llama 3 and 3.2 models
(arXiv:2407.21783).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from titanarch.contract.mixer import MIXERS

Table = dict[str, Any]


def _plain(n_layers: int, d_model: int, n_heads: int) -> Table:
    """A size alone, with the classic MLP of four times the width."""
    return {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "channel": {"kind": "mlp", "activation": "gelu"}}


def _llama3(n_layers: int, d_model: int, n_heads: int, d_ff: int, *, tied_head: bool, scaled: bool) -> Table:
    """``scaled``: with the frequency scaling of the long-context releases (3.2)."""
    rotary: Table = {"kind": "rotary", "theta": 500_000.0}
    if scaled:
        rotary["scaling"] = {"kind": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "vocab_size": 128_256,
        "tied_head": tied_head,
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "channel": {"kind": "swiglu", "d_ff": d_ff},
        "position": {"relative": rotary},
        "mixers": {"attention": {"n_kv_heads": 8}},
    }


FLAVORS: Mapping[str, Table] = {
    "xsmall": _plain(4, 256, 4),
    "small": _plain(6, 384, 6),
    "medium": _plain(8, 512, 8),
    "large": _plain(12, 768, 12),
    "xlarge": _plain(16, 1024, 16),
    "march_36m": _plain(6, 512, 8),
    "gpt_125m": _plain(12, 768, 12),
    "gpt_350m": _plain(24, 1024, 16),
    "gpt_1_3b": _plain(24, 2048, 16),
    "llama3_1b": _llama3(16, 2048, 32, 8192, tied_head=True, scaled=True),
    "llama3_3b": _llama3(28, 3072, 24, 8192, tied_head=True, scaled=True),
    "llama3_8b": _llama3(32, 4096, 32, 14336, tied_head=False, scaled=False),
    "llama3_70b": _llama3(80, 8192, 64, 28672, tied_head=False, scaled=False),
}

WHOLE = "channel"
"""What ``channel_layers`` calls [model.channel]."""

INHERITED_BY_MIXERS = ("n_heads",)
"""Keys of [model] that a mixer's table takes where it has such a key and does not give it, unless it can do without (default None)."""


def complete(table: Table) -> Table:
    """A [model] table with its flavor's keys, one table for each mixer named in ``layers``, and inherited keys.

    What is malformed is left as it is: validation says where.
    """
    flavor = table.get("flavor")
    if isinstance(flavor, str) and flavor in FLAVORS:
        table = with_defaults(table, FLAVORS[flavor])
    table = _complete_channels(table)
    layers = table.get("layers", ("attention",))
    return complete_mixers(table, layers) if isinstance(layers, list | tuple) else table


def _complete_channels(table: Table) -> Table:
    """With a table for each channel mixer that ``channel_layers`` names, the kind of each its name unless given."""
    layers, channels = table.get("channel_layers", ()), table.get("channels", {})
    if not isinstance(layers, list | tuple) or not isinstance(channels, dict):
        return table
    names = dict.fromkeys([name for name in layers if isinstance(name, str) and name != WHOLE] + list(channels))
    tables = {name: {"kind": name, **value} if isinstance(value := channels.get(name, {}), dict) else value for name in names}
    return {**table, "channels": tables} if tables else table


def complete_mixers(table: Table, layers: Sequence[Any]) -> Table:
    """A [model] table with a table for each mixer that it describes or that ``layers`` names, and inherited keys."""
    mixers = table.get("mixers", {})
    if not isinstance(mixers, dict):
        return table
    names = dict.fromkeys([name for name in layers if isinstance(name, str)] + list(mixers))
    return {**table, "mixers": {name: _complete_mixer(name, mixers.get(name, {}), table) for name in names}}


def _complete_mixer(name: str, mixer: Any, model: Table) -> Any:
    if isinstance(mixer, str):
        mixer = {"kind": mixer}
    if not isinstance(mixer, dict):
        return mixer
    mixer = {"kind": name, **mixer}
    if mixer["kind"] not in MIXERS:
        return mixer
    fields = MIXERS[mixer["kind"]].Config.model_fields
    inherited = {key: model[key] for key in INHERITED_BY_MIXERS if key in model and key in fields and fields[key].default is not None}
    position = model.get("position")
    if isinstance(position, dict) and "relative" in position:
        inherited["position"] = position["relative"]
    return {**{key: value for key, value in inherited.items() if key in fields}, **mixer}


def with_defaults(table: Table, defaults: Mapping[str, Any]) -> Table:
    """``table`` with what it lacks from ``defaults``; a component of another kind keeps none of them."""
    merged = {**defaults, **table}
    for key in defaults.keys() & table.keys():
        default, value = defaults[key], table[key]
        if not isinstance(default, Mapping):
            continue
        if isinstance(value, str) and value == default.get("kind"):
            merged[key] = dict(default)
        elif isinstance(value, dict) and value.get("kind", default.get("kind")) == default.get("kind"):
            merged[key] = with_defaults(value, default)
    return merged
