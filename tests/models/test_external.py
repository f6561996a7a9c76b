"""The way in for ideas that do not fit: LocalMixer, and any nn.Module by its import path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.runs import losses, write_config
from titanarch.cli.main import main
from titanarch.config.errors import ConfigError
from titanarch.contract.cost import Cost
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.mixer import LocalMixer, MixerConfig, mixer
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.models.decoder import Decoder, DecoderConfig


class RunningMeanConfig(MixerConfig):
    """No keys."""


@mixer("test_running_mean")
class RunningMean(LocalMixer):
    """A user's idea in its shortest form: the mean of the document so far, projected."""

    Config = RunningMeanConfig

    def __init__(self, config: RunningMeanConfig, shape: ModelShape, layer: int) -> None:
        super().__init__(config, shape, layer)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias=False)

    @staticmethod
    def cost(config: RunningMeanConfig, shape: ModelShape, layer: int) -> Cost:
        return Cost(shape.d_model**2, 2.0 * shape.d_model**2)

    def reset_parameters(self, init: Init) -> None:
        init.linear(self.out)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        same = (seq.document_BT[:, :, None] == seq.document_BT[:, None]) & (seq.index_T[:, None] >= seq.index_T)
        y: Tensor = self.out(same.to(x_BTD.dtype) @ x_BTD / same.sum(-1, keepdim=True))
        return y


class Doubled(nn.Module):
    """Somebody else's layer: returns a tuple, knows nothing of us."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.offset = offset

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.inner(x).cumsum(1) + self.offset, None


def table(mixer: dict[str, Any]) -> dict[str, Any]:
    return {"n_layers": 2, "d_model": 16, "n_heads": 2, "channel": "mlp", "layers": ["mine", "attention"], "mixers": {"mine": mixer}}


def decoder(mixer: dict[str, Any]) -> Decoder:
    config = DecoderConfig.model_validate(table(mixer))
    model = Decoder(config, 32, 8)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=0, n_layers=2))
    return model


EXTERNAL = {"kind": "external", "module": f"{__name__}:Doubled", "arguments": {"width": "$d_model", "offset": 0.5}}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.Doubled = Doubled  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("mixer", [{"kind": "test_running_mean"}, EXTERNAL])
def test_cost_and_gradients(mixer: dict[str, Any]) -> None:
    model = decoder(mixer)
    assert Decoder.cost(model.config, 32, 8).parameters == sum(p.numel() for p in model.parameters())
    x = torch.randint(32, (2, 8))
    model(x, SequenceInfo.whole(2, 8), x.roll(-1, 1)).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.layers[0].mixer.parameters())


def test_weights_of_an_external_module_are_its_own_draws_keyed_by_name() -> None:
    first, again = decoder(EXTERNAL), decoder(EXTERNAL)
    weight = first.layers[0].mixer.wrapped.inner.weight.detach()
    assert torch.equal(weight, again.layers[0].mixer.wrapped.inner.weight)
    assert float(weight.abs().max()) <= 1 / 4  # nn.Linear's own bound for 16 inputs
    assert float(weight.std()) == pytest.approx(1 / 4 / 3**0.5, rel=0.15)


def test_packed_rows_are_refused_unless_allowed() -> None:
    x = torch.randint(32, (1, 8))
    packed = SequenceInfo.of_lengths([(4, 4)])
    with pytest.raises(ConfigError, match="mix_documents = true"):
        decoder(EXTERNAL).logits(x, packed)
    assert decoder({**EXTERNAL, "mix_documents": True}).logits(x, packed).shape == (1, 8, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": "no_such_package:Layer"}, "cannot import"),
        ({"module": "torch.nn:NoSuchLayer"}, "cannot import"),
        ({"module": "torch:randn"}, "no nn.Module class"),
        ({"arguments": {"wide": 3}}, "does not take these arguments"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decoder({**EXTERNAL, **change})


def test_a_local_mixer_trains(tmp_path: Path) -> None:
    config = write_config(tmp_path, "mine", tmp_path / "cache")
    layers = ["--model.layers", '["test_running_mean", "attention"]', "--activation_checkpoint.mode", "full", "--training.steps", "4"]
    assert main(["train", "--config", str(config), *layers]) == 0
    assert len(losses(tmp_path / "mine")) == 4
