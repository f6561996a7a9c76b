"""Activation checkpointing: no mode changes a gradient or a name, and each keeps what it says."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.activation_memory import measure
from tests.parallel.divided import SEED
from tests.parallel.steps import EVERYTHING, PLAIN, T, V, rows
from titanarch.contract.init import Init, qualified_names
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.activation_checkpoint import apply_activation_checkpoint, recomputed_blocks
from titanarch.parallel.check import technique_problems
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.mesh import Degrees

EXTERNAL_DROPOUT = {
    **PLAIN,
    "layers": ["attention", "drop"],
    "mixers": {"drop": {"kind": "external", "module": "torch.nn:Dropout", "arguments": {"p": 0.5}, "mix_documents": True}},
}
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "selective, operators": {"mode": "selective"},
    "selective, every second block": {"mode": "selective", "selective_ac_option": "2"},
}


def bare_model(table: dict[str, Any], checkpointing: dict[str, Any]) -> Decoder:
    config = DecoderConfig.model_validate(table)
    model = Decoder(config, V, T)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=SEED, n_layers=config.n_layers))
    apply_activation_checkpoint(model, ActivationCheckpointConfig.model_validate(checkpointing))
    return model


def gradients(model: Decoder) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model(*rows(1)).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("table", [EVERYTHING, EXTERNAL_DROPOUT], ids=["drawn by key", "drawn from torch's generator"])
def test_gradients_and_names_are_those_of_no_checkpointing(table: dict[str, Any], mode: str) -> None:
    plain, checkpointed = bare_model(table, {}), bare_model(table, MODES[mode])
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    expected, found = gradients(plain), gradients(checkpointed)
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_selected_operators_run_once_and_the_others_twice() -> None:
    counts = {}
    for name, mode in (("none", {}), ("full", MODES["full"]), ("selective", MODES["selective, operators"])):
        model = bare_model(PLAIN, mode)
        with Counted() as counts[name]:
            model(*rows(0)).total.backward()
    products, none = ("aten::mm", "aten::addmm"), counts["none"].names
    n_products = {name: sum(counted.names[product] for product in products) for name, counted in counts.items()}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert none[attention] == 2, "the test's model no longer uses this operator"
    assert n_products["selective"] == n_products["none"] < n_products["full"]
    assert counts["selective"].names[attention] == 2
    assert counts["full"].names[attention] == 4
    assert counts["selective"].names["aten::gelu"] == counts["full"].names["aten::gelu"] == 2 * none["aten::gelu"]


def test_every_nth_block_is_recomputed() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.model_validate({**PLAIN, "n_layers": 7}), V, T)
    blocks = list(model.blocks())

    def numbers(table: dict[str, Any]) -> list[int]:
        return [blocks.index(block) for block in recomputed_blocks(model, ActivationCheckpointConfig.model_validate(table))]

    assert numbers({"mode": "selective", "selective_ac_option": 3}) == [2, 5]
    assert numbers({"mode": "selective"}) == numbers({"mode": "full"}) == list(range(7))
    assert numbers({"mode": "none"}) == numbers({"mode": "memory_budget"}) == []


def test_memory_falls_by_what_is_not_kept() -> None:
    table = {**PLAIN, "n_layers": 6, "position": {"relative": "alibi"}}
    found = {name: measure(table, 256, mode) for name, mode in {"none": {"mode": "none"}, **MODES}.items()}
    kept = {name: each["kept_bytes"] for name, each in found.items()}
    stream_bytes = 256 * PLAIN["d_model"] * 4
    assert stream_bytes * 6 <= kept["full"] <= stream_bytes * 6 * 1.2  # each block's input; the last one's output for the first's
    assert kept["none"] >= 10 * kept["full"]
    assert kept["full"] < kept["selective, operators"] < kept["none"]
    assert kept["selective, every second block"] == pytest.approx((kept["none"] + kept["full"]) / 2, rel=0.05)
    assert found["none"]["peak_bytes"] >= 2.5 * found["full"]["peak_bytes"]
    assert len({each["gradient_norm"] for each in found.values()}) == 1


@pytest.mark.parametrize(
    ("table", "key", "text"),
    [
        ({"mode": "memory_budget"}, "activation_checkpoint.mode", "set compile.enable to true"),
        ({"mode": "selective", "selective_ac_option": 3}, "activation_checkpoint.selective_ac_option", "of 2 blocks no 3-th one"),
    ],
)
def test_what_would_do_nothing_is_refused(table: dict[str, Any], key: str, text: str) -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.model_validate(PLAIN), V, T)
    (problem,) = technique_problems(
        model,
        activation_checkpoint=ActivationCheckpointConfig.model_validate(table),
        compile_config=CompileConfig(),
        float8=Float8Config(),
        parallelism=ParallelismConfig(),
        degrees=Degrees(1, 1),
        seq_len=T,
        device_type="cpu",
    )
    assert problem.key == key
    assert text in problem.message
