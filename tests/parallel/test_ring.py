"""Ring context parallelism on rows long enough for attention's kernels: exact, in bounded memory, and one graph when compiled."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parallel.test_mixer_contract import outcome
from titanarch.contract.init import Init, InitConfig, qualified_names
from titanarch.contract.sequence import MixSequence, SequenceInfo
from titanarch.contract.shape import ModelShape
from titanarch.contract.split import ContextParallel
from titanarch.models.mixers.attention import Attention, AttentionConfig
from titanarch.parallel.compile import CompiledInTraining
from titanarch.parallel.config import CompileConfig
from titanarch.parallel.context_layout import ContextLayout
from titanarch.parallel.context_parallel import apply_context_parallel

B, T, D, H, G, K = 2, 512, 16, 4, 2, 16
CASES: dict[str, dict[str, Any]] = {
    "learned bias": {"n_kv_heads": G, "position": "linear_cpb", "sinks": True, "soft_cap": 5.0},
    "window": {"position": "alibi", "window": 100, "dropout": 0.2},
    "flash": {"position": "alibi", "sinks": True},
    "bare": {},
}


def attention(**options: Any) -> Attention:
    shape = ModelShape(d_model=D, vocab_size=32, seq_len=T, layers=("mixer",))
    mixer = Attention(AttentionConfig.model_validate({"n_heads": H, "head_dim": K, **options}), shape, 0)
    mixer.reset_parameters(Init(InitConfig(std=0.3), names=qualified_names(mixer), seed=1, n_layers=1))
    return mixer


def rows(*, packed: bool) -> SequenceInfo:
    """Documents from 1 to 300 tokens, or a row each."""
    if not packed:
        return SequenceInfo.whole(B, T, seed=0)
    return SequenceInfo.of_lengths(((1, 300, 64, 128, 19), (63, 65, 200, 100, 84)), seed=0, first_row=3)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def whole(x: Tensor, layout: ContextLayout) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(layout.degree)]
    dist.all_gather(gathered, x.contiguous(), group=layout.group)
    return layout.in_order(torch.cat(gathered, 1))


def divided_outcome(mixer: Attention, seq: SequenceInfo, layout: ContextLayout) -> dict[str, Tensor]:
    """Output and gradients on this process's tokens, made whole."""
    apply_context_parallel(mixer, layout, ContextParallel.RING)
    found = outcome(mixer, layout.own(draw(B, T, D).to(mixer.wq.weight), 1), layout.divide(seq), layout.own(draw(B, T, D), 1))
    for key, value in found.items():
        if key in ("output", "input"):
            found[key] = whole(value, layout)
        else:
            dist.all_reduce(value)
    return found


def streams() -> dict[str, Tensor]:
    return {"q": draw(B, T, H, K), "k": draw(B, T, G, K), "v": draw(B, T + 1, G, K)[:, 1:]}


def in_bfloat16(layout: ContextLayout | None) -> Tensor:
    """y of bfloat16 streams, merged or of one process."""
    mixer, seq = attention(n_kv_heads=G), rows(packed=False)
    if layout is None:
        return mixer.mix_step(mixer, {n: x.bfloat16() for n, x in streams().items()}, {}, MixSequence(seq, seq)).y_BTHV
    apply_context_parallel(mixer, layout, ContextParallel.RING)
    own = layout.divide(seq)
    own_streams = {n: layout.own(x.bfloat16(), 1) for n, x in streams().items()}
    return whole(mixer.mix_step(mixer, own_streams, {}, MixSequence(own, own)).y_BTHV, layout)


def kept_bytes(layout: ContextLayout) -> tuple[int, int]:
    """What the mix step keeps for the backward, and what its own streams, output and lse hold."""
    mixer, seq = attention(n_kv_heads=G), layout.divide(rows(packed=True))
    apply_context_parallel(mixer, layout, ContextParallel.RING)
    own = {name: layout.own(x, 1).requires_grad_() for name, x in streams().items()}
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = mixer.mix_step(mixer, own, {}, MixSequence(seq, seq)).y_BTHV
    n_elements = sum(x.numel() for x in (*own.values(), y)) + y.shape[0] * y.shape[1] * y.shape[2]
    return sum(kept), n_elements * y.element_size()


def on_four_processes() -> tuple[dict[str, dict[str, Tensor]], Tensor, tuple[int, int]]:
    layouts = {name: ContextLayout(dist.group.WORLD, head_tail=name != "window") for name in CASES}
    found = {
        name: divided_outcome(attention(**options).double(), rows(packed=name != "bare"), layouts[name]) for name, options in CASES.items()
    }
    return found, in_bfloat16(layouts["bare"]), kept_bytes(layouts["bare"])


@pytest.fixture(scope="module")
def four_ranks() -> list[tuple[dict[str, dict[str, Tensor]], Tensor, tuple[int, int]]]:
    return run_distributed(on_four_processes, 4)


@pytest.mark.parametrize("name", list(CASES))
def test_four_processes_equal_one(four_ranks, name: str) -> None:
    expected = outcome(attention(**CASES[name]).double(), draw(B, T, D), rows(packed=name != "bare"), draw(B, T, D))
    for found, _, _ in four_ranks:
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-10, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_merging_adds_little_to_the_rounding_of_bfloat16(four_ranks) -> None:
    mixer, seq = attention(n_kv_heads=G), rows(packed=False)
    exact = mixer.mix_step(mixer, {n: x.bfloat16().double() for n, x in streams().items()}, {}, MixSequence(seq, seq)).y_BTHV
    one_error = (in_bfloat16(None).double() - exact).abs().max()
    for _, found, _ in four_ranks:
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).abs().max() <= 2 * one_error


def test_no_process_keeps_the_keys_of_another(four_ranks) -> None:
    for _, _, (kept, own) in four_ranks:
        assert kept == own


def compiled_and_eager() -> list[dict[str, Tensor]]:
    """On the same process: the contract's rows, eager and as one graph."""
    found = []
    for is_compiled in (False, True):
        mixer = attention(n_kv_heads=G, position="linear_cpb", sinks=True).double()
        if is_compiled:
            mixer.forward = CompiledInTraining(mixer.forward, CompileConfig(enable=True, backend="aot_eager"))  # type: ignore[method-assign]
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            found.append(divided_outcome(mixer, rows(packed=True), ContextLayout(dist.group.WORLD, head_tail=True)))
    return found


def test_a_ring_compiles_to_one_graph() -> None:
    for eager, compiled in run_distributed(compiled_and_eager, 2, timeout_seconds=400.0):
        assert compiled.keys() == eager.keys()
        for key, value in eager.items():
            torch.testing.assert_close(compiled[key], value, rtol=1e-10, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
