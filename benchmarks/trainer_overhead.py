"""The trainer's own time: its step against a bare hand-written loop around the same model.

    PYTHONPATH=. python benchmarks/trainer_overhead.py                       # 10 to 20 minutes
    PYTHONPATH=. python benchmarks/trainer_overhead.py --models null --rounds 10 --record ""

One side is the trainer as a run uses it: loader, step, clipping, schedule, metrics, garbage collection, loader state, a row
every 10 steps to the default sinks but the terminal's. The other is the least that trains the same: batches made
beforehand, forward, backward, ``clip_grad_norm_``, torch's fused AdamW, the same schedule. Both start from the same weights
and read the same rows; how far the weights are apart after the first steps stands in the record. The models: ``null``, which
costs nothing, so that what remains is the trainer, and a decoder of 12M parameters. Two more pairs: the trainer against the
bare loop with the trainer's own clipping and AdamW, which work on shards and skip DTensor's dispatch, so that what remains is
the loop around them; and what FSDP2 itself costs, the bare loop around the model wrapped in it and as it is.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import null_model  # noqa: F401 (registers the model)
import torch
from measure import Comparison, Sample, bootstrap_ratio, compare, record
from sliced_trainer import SlicedTrainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanarch.contract.init import InitConfig, qualified_names
from titanarch.contract.model import Model
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import IGNORED, Batch
from titanarch.data.loader import build_loader
from titanarch.evaluate.sequence import sequence_of
from titanarch.parallel.apply import materialize
from titanarch.train.check import meta_model, vocabulary
from titanarch.train.gradients import GradientClipper
from titanarch.train.local_optimizers import LocalAdam
from titanarch.train.processes import Processes, start_processes, stop_processes
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.run_folder import RunFolder
from titanarch.train.setup import build_model

TOTAL_STEPS = 1_000_000
N_BATCHES = 64
LR, BETAS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
DECODER = {"name": "decoder", "n_layers": 5, "d_model": 384, "n_heads": 6, "channel": "mlp", "tied_head": True}
MODELS: dict[str, dict[str, Any]] = {
    "null": {"name": "null"},
    "12m": {**DECODER, "position": {"relative": "rotary"}},
    "tiny": {**DECODER, "n_layers": 1, "d_model": 12},
}


@dataclass(frozen=True)
class Scale:
    """``rows`` of ``seq_len`` tokens a step, ``steps`` a call, ``rounds`` of eight calls."""

    rows: int
    seq_len: int
    steps: int
    rounds: int


SCALES = {"null": Scale(8, 128, 100, 24), "12m": Scale(2, 128, 10, 8), "tiny": Scale(2, 32, 10, 2)}


class BareLoop:
    """The least that trains ``model``. ``own``: with the trainer's clipping and AdamW in place of torch's."""

    def __init__(self, model: Model, batches: list[tuple[Batch, SequenceInfo, int]], *, own: bool = False) -> None:
        self.model = model
        self.batches: Iterator[tuple[Batch, SequenceInfo, int]] = itertools.cycle(batches)
        self.parameters = list(model.parameters())
        matrices, vectors = ([p for p in self.parameters if (p.dim() >= 2) is decays] for decays in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.clip: Callable[[], Tensor]
        self.optimizer: torch.optim.Optimizer
        if own:
            self.clip = GradientClipper(self.parameters, MAX_NORM).clip
            self.optimizer = LocalAdam(groups, lr=LR, betas=BETAS, decoupled_weight_decay=True, fused=True)
        else:
            self.clip = partial(torch.nn.utils.clip_grad_norm_, self.parameters, MAX_NORM)
            self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        self.step = 0

    def steps(self, n: int) -> None:
        """``n`` steps."""
        for _ in range(n):
            for group in self.optimizer.param_groups:
                group["lr"] = LR * (1 - self.step / TOTAL_STEPS)
            batch, sequence, n_targets = next(self.batches)
            objective = self.model(batch.tokens_BT, sequence, batch.labels_BT)
            (objective.total / n_targets).backward()
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def configuration(name: str, scale: Scale, folder: Path) -> RunConfig:
    """A run of model ``name`` in ``folder``, resolved."""
    adamw = {"name": "AdamW", "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": WEIGHT_DECAY}
    training = {"seq_len": scale.seq_len, "global_batch_size": scale.rows, "steps": TOTAL_STEPS, "max_norm": MAX_NORM}
    table = {
        "job": {"dump_folder": str(folder)},
        "model": MODELS[name],
        "data": {"limit_documents": 200, "cache_dir": str(folder / "cache")},
        "training": {**training, "mixed_precision_param": "float32"},
        "optimizer": adamw,
        "lr_scheduler": "linear",
        "checkpoint": {"interval": TOTAL_STEPS},
        "metrics": {"sinks": ["jsonl", "tensorboard", "plot"]},
        "validation": {"enable": False},
        "evaluation": {"enable": False},
    }
    return resolve(RunConfig.model_validate(table), seed=0, device_type="cpu")


def batches_of(trainer: SlicedTrainer) -> list[tuple[Batch, SequenceInfo, int]]:
    """The first batches that ``trainer`` will read, with what the model is told of them and their targets counted."""
    training = trainer.config.training
    loader = build_loader(
        trainer.config.data,
        tokenizer=trainer.tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.global_batch_size,
        dp_rank=0,
        dp_degree=1,
        seed=0,
    )
    taken = [next(loader) for _ in range(N_BATCHES)]
    return [(batch, sequence_of(batch, seed=0), int((batch.labels_BT != IGNORED).sum())) for batch in taken]


def unwrapped(config: RunConfig, vocab_size: int) -> Model:
    """The same model and weights without FSDP2."""
    model = meta_model(config, vocab_size)
    materialize(model, qualified_names(model), getattr(config.model, "init", InitConfig()), seed=0, device=torch.device("cpu"))
    return model


def whole(model: Model) -> list[Tensor]:
    """Copies of all parameters."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def apart(first: Model, second: Model) -> float:
    """The largest difference between two models' parameters."""
    return max((a - b).abs().max().item() for a, b in zip(whole(first), whole(second), strict=True))


def extra_microseconds(comparison: Comparison, steps: int, clock: str) -> dict[str, float]:
    """What the first program takes beyond the second, us a step: median over the rounds and its 95 % interval."""

    def extra(samples: list[Sample]) -> float:
        a, b, c, d = (getattr(sample, clock) for sample in samples)
        return 1e6 * (a + d - b - c) / 2 / steps

    median = bootstrap_ratio([extra(samples) for samples in comparison.rounds])
    return {"median": median.median, "low": median.low, "high": median.high}


def compare_all(name: str, scale: Scale, processes: Processes, folder: Path) -> tuple[list[Comparison], dict[str, Any]]:
    """The three pairs of one model, and what follows from them."""
    config = configuration(name, scale, folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = SlicedTrainer(config, processes, RunFolder(folder))
    vocab_size = vocabulary(config, trainer.tokenizer.vocab_size)
    batches = batches_of(trainer)
    bare, own = (BareLoop(build_model(config, processes, vocab_size).model, batches, own=own) for own in (False, True))
    plain = BareLoop(unwrapped(config, vocab_size), batches)
    programs = {
        "trainer": trainer,
        "bare loop": bare,
        "bare loop, our AdamW and clipping": own,
        "bare loop, no FSDP2": plain,
    }
    called = {key: (f"{name}: {key}", partial(program.steps, scale.steps)) for key, program in programs.items()}
    pairs = {
        "trainer_over_bare": ("trainer", "bare loop"),
        "trainer_over_bare_with_our_adamw_and_clipping": ("trainer", "bare loop, our AdamW and clipping"),
        "fsdp2_over_none": ("bare loop", "bare loop, no FSDP2"),
    }
    with ExitStack() as stack:
        trainer.open(stack)
        for _, call in called.values():
            call()
        distances = {key: apart(program.model, bare.model) for key, program in programs.items()}
        compared = {
            pair: compare(called[first], called[second], n_rounds=scale.rounds if pair == "trainer_over_bare" else scale.rounds // 2)
            for pair, (first, second) in pairs.items()
        }
    against_bare, n_tokens = compared["trainer_over_bare"], scale.steps * trainer.tokens_per_step
    summary = {
        "model": name,
        "parameters": trainer.cost.parameters,
        "tokens_per_step": trainer.tokens_per_step,
        "steps_per_call": scale.steps,
        "largest_weight_difference_from_bare_after_first_call": distances,
        "extra_us_per_step": {
            pair: {clock: extra_microseconds(comparison, scale.steps, f"{clock}_seconds") for clock in ("wall", "cpu")}
            for pair, comparison in compared.items()
        },
        "trainer_tokens_per_second": n_tokens / against_bare.first_median_seconds,
        "bare_tokens_per_second": n_tokens / against_bare.second_median_seconds,
    }
    return list(compared.values()), summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["null", "12m"])
    parser.add_argument("--rounds", type=int, default=0, help="0: the model's own number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", default="trainer_overhead", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processes = start_processes(RunConfig.model_fields["comm"].get_default(call_default_factory=True))
    if processes.device.type != "cpu":
        parser.error("this benchmark is of the CPU: hide the GPUs from it")
    results: list[Comparison | dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            scale = SCALES[name]
            scale = Scale(scale.rows, scale.seq_len, scale.steps, options.rounds or scale.rounds)
            comparisons, summary = compare_all(name, scale, processes, Path(folder) / name)
            results += [*comparisons, summary]
            print(*(comparison.summary() for comparison in comparisons), json.dumps(summary, indent=1), sep="\n", flush=True)
            if options.record:
                record(options.record, results, settings=vars(options))
    stop_processes()


if __name__ == "__main__":
    main()
