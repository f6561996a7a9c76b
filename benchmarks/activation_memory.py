"""Memory of activation checkpointing: what the blocks keep after the forward, and the peak of forward and backward.

    python -m benchmarks.activation_memory                 # small, 2,048 tokens; about a minute
    python -m benchmarks.activation_memory --flavor xsmall --tokens 512 --record ""

One row through the blocks of the decoder on a CPU, in float32, without embedding, head and loss. Memory is what the
profiler's allocator events add up to: ``kept`` at the end of the forward, ``peak`` over forward and backward, gradients of
the weights included. Weights and the input are allocated before and not counted.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import titanarch.models.components  # noqa: F401 (registers all)
from benchmarks.measure import record
from titanarch.contract.init import Init, qualified_names
from titanarch.contract.sequence import SequenceInfo
from titanarch.contract.side_channels import Carry
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.activation_checkpoint import apply_activation_checkpoint
from titanarch.parallel.config import ActivationCheckpointConfig

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "selective, op": {"mode": "selective"},
    "selective, 2": {"mode": "selective", "selective_ac_option": 2},
}


def held_bytes(recorded: profile) -> tuple[int, int]:
    """Bytes that tensors allocated since the profiler started hold at its end, and the most that they held."""
    assert recorded.profiler is not None, "the profiler has stopped"
    results = recorded.profiler.kineto_results
    assert results is not None, "the profiler has stopped"
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak


def through_blocks(model: Decoder, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
    carry = Carry.empty()
    for block in model.blocks():
        x_BTD, carry = block(x_BTD, seq, carry)
    return x_BTD


def measure(table: dict[str, Any], tokens: int, checkpointing: dict[str, Any]) -> dict[str, Any]:
    """``kept_bytes`` and ``peak_bytes`` of the decoder of ``table``, one row of ``tokens``, under one mode."""
    config = DecoderConfig.model_validate(table)
    model = Decoder(config, 8, tokens)
    model.reset_parameters(Init(config.init, names=qualified_names(model), seed=0, n_layers=config.n_layers))
    apply_activation_checkpoint(model, ActivationCheckpointConfig.model_validate(checkpointing))
    generator = torch.Generator().manual_seed(0)
    x_BTD, upstream = (torch.randn(1, tokens, config.d_model, generator=generator) for _ in range(2))
    x_BTD.requires_grad_()
    seq = SequenceInfo.whole(1, tokens, seed=0)
    # Once unmeasured: tensors that torch allocates for good on its first use are not activations.
    through_blocks(model, x_BTD, seq).backward(upstream)
    model.zero_grad()
    x_BTD.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        y_BTD = through_blocks(model, x_BTD, seq)
    del y_BTD
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as both:
        through_blocks(model, x_BTD, seq).backward(upstream)
    gradient = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    return {"kept_bytes": held_bytes(forward)[0], "peak_bytes": held_bytes(both)[1], "gradient_norm": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="small")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--position", default="alibi")
    parser.add_argument("--record", default="activation_memory", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = {"flavor": options.flavor, "position": {"relative": options.position}}
    results: list[dict[str, Any]] = []
    for name, checkpointing in MODES.items():
        found = {"mode": name, **measure(table, options.tokens, checkpointing)}
        results.append(found)
        ratios = [results[0][key] / found[key] for key in ("kept_bytes", "peak_bytes")]
        mebibytes = [found[key] / 2**20 for key in ("kept_bytes", "peak_bytes")]
        print(
            f"{name}: kept {mebibytes[0]:.1f} MiB ({ratios[0]:.2f} x fewer), peak {mebibytes[1]:.1f} MiB ({ratios[1]:.2f} x lower), "
            f"gradient norm {found['gradient_norm']!r}",
            flush=True,
        )
    if options.record:
        record(options.record, results, settings=vars(options))


if __name__ == "__main__":
    main()
