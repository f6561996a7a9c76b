"""Which backend a recurrence takes, what a run says of it, and the call of mamba-ssm, whose package is replaced."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.config.dump import dump_toml
from titanarch.config.errors import ConfigError
from titanarch.config.load import load_config
from titanarch.contract.model import MODELS
from titanarch.models.mixers import mamba2
from titanarch.models.mixers.mamba2 import Mamba2, Mamba2Config
from titanarch.ops import recurrence_backend
from titanarch.ops._decay_kernels import mamba_ssm_recurrence
from titanarch.train.processes import Processes
from titanarch.train.run_config import RunConfig
from titanarch.train.setup import kernel_notes, open_run

CUDA: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
KERNELS = ("mamba_ssm", "fla")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(recurrence_backend, "import_failure", lambda name: "" if name in names else "absent")


def test_auto_is_the_first_kernel_that_is_installed_and_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, expected in ((KERNELS, "mamba_ssm"), (("fla",), "fla"), ((), "reference")):
        installed(monkeypatch, *names)
        assert recurrence_backend.chosen("auto", CUDA, KERNELS) == expected
    installed(monkeypatch, *KERNELS)
    for change in ({"device": torch.device("cpu")}, {"dtype": torch.float64}):
        assert recurrence_backend.chosen("auto", SimpleNamespace(**{**vars(CUDA), **change}), KERNELS) == "reference"  # type: ignore[arg-type]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert recurrence_backend.chosen("auto", CUDA, KERNELS) == "reference"
    assert recurrence_backend.chosen("fla", CUDA, KERNELS) == "fla"


def test_a_run_says_once_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence for each kind of mixer, however many blocks have it; none where a backend is named."""
    table = {"name": "decoder", "n_layers": 6, "d_model": 64, "n_heads": 2, "layers": ["mamba2", "gla", "attention"], "channel": "none"}

    def notes(device_type: str, *, compiled: bool = False, **mixers: Any) -> list[str]:
        config = MODELS.resolve({**table, "mixers": mixers})
        with torch.device("meta"):
            return list(kernel_notes(MODELS.of(config)(config, 32, 16), device_type, compiled=compiled))

    installed(monkeypatch, "fla")
    on_cpu = "reference, as kernels are for CUDA and this is cpu"
    assert notes("cpu") == [f"Mamba2: recurrence by {on_cpu}, convolutions by {on_cpu}", f"GLA: recurrence by {on_cpu}"]
    found = notes("cuda")
    assert found[0] == "Mamba2: recurrence by fla (mamba_ssm: absent), convolutions by reference (causal_conv1d: absent)"
    assert found[1] == "GLA: recurrence by fla"
    assert notes("cuda", compiled=True)[1] == "GLA: recurrence by reference in training, whose graphs hold no kernels; in evaluation fla"
    assert notes("cuda", mamba2={"backend": "reference"}, gla={"backend": "fla"}) == []


def test_evaluation_refuses_a_kernel_that_cannot_run_here(tmp_path: Path) -> None:
    """Of a run that was trained on CUDA; before anything is loaded."""
    debug = Path(__file__).resolve().parents[2] / "train_configs" / "debug.toml"
    overrides = ["--model.layers", '["gla"]', "--model.mixers.gla.backend", "fla"]
    (tmp_path / "config.toml").write_text(dump_toml(load_config(debug, overrides, RunConfig).config))
    with pytest.raises(ConfigError, match="GLA: backend 'fla' is for CUDA, and this is cpu"):
        open_run(tmp_path, Processes(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("starts_at", [None, [(0, 0), (0, 5), (1, 3)], [(1, 0)]])
def test_mamba_ssm_is_called_for_the_same_recurrence(starts_at: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signature and what it promises, token by token: states [B, H, V, K] go on where a document's number does, from 0."""

    def kernel(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, initial_states: Tensor, seq_idx: Tensor | None,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (chunk_size, return_final_states, initial_states.is_contiguous()) == (16, True, True)
        assert seq_idx is None or seq_idx.dtype == torch.int32
        heads = x.shape[2] // B.shape[2]
        S, before, outputs = initial_states, torch.zeros(len(x), dtype=torch.int32), []
        for t in range(x.shape[1]):
            number = before if seq_idx is None else seq_idx[:, t]
            S = S * (number == before)[:, None, None, None] * torch.exp(dt[:, t] * A)[..., None, None]
            key, query = (z[:, t].repeat_interleave(heads, dim=1) for z in (B, C))
            S = S + (dt[:, t, :, None] * x[:, t])[..., None] * key[:, :, None]
            outputs.append((S * query[:, :, None]).sum(-1))
            before = number
        return torch.stack(outputs, 1), S

    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
    generator = torch.Generator().manual_seed(0)
    rows, T, H, P, G, N = 2, 20, 4, 3, 2, 5
    x, dt = torch.randn(rows, T, H, P, generator=generator), torch.randn(rows, T, H, generator=generator)
    b, c = (torch.randn(rows, T, G, N, generator=generator) for _ in range(2))
    starts = None if starts_at is None else torch.zeros(rows, T, dtype=torch.bool)
    for row, token in starts_at or ():
        starts[row, token] = True  # type: ignore[index]
    params = {"a_log_H": torch.rand(H, generator=generator), "dt_bias_H": torch.zeros(H), "d_H": torch.ones(H)}
    state = {"recurrent": torch.randn(rows, H, N, P, generator=generator)}
    seq: Any = SimpleNamespace(query=SimpleNamespace(starts_BT=starts))
    results = []
    for backend in ("mamba_ssm", "reference"):
        config = Mamba2Config.model_validate({"chunk_size": 16, "backend": backend})
        with monkeypatch.context() as patch:
            patch.setattr(mamba2, "mamba_ssm_recurrence", counted := Counted())
            results.append(Mamba2.mix(config, {"x": x, "dt": dt, "b": b, "c": c}, params, seq, state))
        assert counted.calls == (backend == "mamba_ssm")
    found, expected = results
    torch.testing.assert_close(found.y_BTHV, expected.y_BTHV, rtol=1e-5, atol=1e-5)
    assert found.state is not None
    assert expected.state is not None
    torch.testing.assert_close(found.state, expected.state, rtol=1e-5, atol=1e-5)


class Counted:
    """``mamba_ssm_recurrence``, and how often it was called."""

    calls = 0

    def __call__(self, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return mamba_ssm_recurrence(*args, **options)
