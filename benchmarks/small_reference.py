"""The main example against plain PyTorch: speed and validation loss of the trainer and of a loop written by hand.

    PYTHONPATH=. python benchmarks/small_reference.py                      # 2 threads: about 20 minutes
    PYTHONPATH=. python benchmarks/small_reference.py --steps 40 --segment 1 --record ""

The reference is the decoder of ``train_configs/small_alibi.toml`` with nothing of titanarch in it: RMSNorm, ALiBi as an
additive mask of ``F.scaled_dot_product_attention`` (documents masked too), GELU MLP, an untied head, the same initial weights,
torch's AdamW without decay of gains, fp32, the same schedule and clipping, and the rows of titanarch's loader
in the same order, read beforehand. The two are trained in turns, segment by segment, to the end of the run; the speeds are those of the
segments, and at the end both read the validation rows. Validation and checkpoints are outside the segments.

Shapes: B rows, T tokens, D model dim, H heads, K head dim, V vocabulary.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Comparison, Sample, call, comparison_of, record
from sliced_trainer import SlicedTrainer
from torch import Tensor, nn

from titanarch.config.load import load_config
from titanarch.data.fixed import FixedBatches
from titanarch.data.loader import build_loader
from titanarch.train.local_optimizers import shard_of
from titanarch.train.processes import start_processes, stop_processes
from titanarch.train.resolve import resolve
from titanarch.train.run_config import RunConfig
from titanarch.train.run_folder import RunFolder

CONFIG = Path(__file__).parents[1] / "train_configs" / "small_alibi.toml"
ROUND = 4  # segments of each side in a round: A B B A A B B A


class Recipe(NamedTuple):
    """The numbers of ``small_alibi.toml``, by hand."""

    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    lr: float = 2e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 20
    min_lr_factor: float = 0.1
    max_norm: float = 1.0


RECIPE = Recipe()
NAMES = {
    "blocks.": "layers.",
    "norm1.": "norms.mixer_norm.",
    "norm2.": "norms.channel_norm.",
    ".q.": ".mixer.wq.",
    ".k.": ".mixer.wk.",
    ".v.": ".mixer.wv.",
    ".out.": ".mixer.wo.",
    ".up.": ".channel.up.",
    ".down.": ".channel.down.",
}
"""Parts of the names of a block's parameters here, and what titanarch's decoder calls them."""


class Rows(NamedTuple):
    """Rows written out beforehand, all int64 [B, T]; label -100: no target."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor


class ReferenceBlock(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        d = recipe.d_model
        self.n_heads = recipe.n_heads
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x_BTD: Tensor, mask_BHTT: Tensor) -> Tensor:
        h = self.norm1(x_BTD)
        q, k, v = (linear(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BHTT)
        x = x_BTD + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ReferenceModel(nn.Module):
    """The decoder by hand; ``load`` gives it its weights."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, recipe.d_model)
        self.blocks = nn.ModuleList(ReferenceBlock(recipe) for _ in range(recipe.n_layers))
        self.norm = nn.RMSNorm(recipe.d_model, eps=1e-5)
        self.head = nn.Linear(recipe.d_model, vocab_size, bias=False)
        self.register_buffer("slope_H", alibi_slopes(recipe.n_heads), persistent=False)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of titanarch's decoder, by their names there."""
        for name, parameter in self.named_parameters():
            theirs = "final_norm.weight" if name == "norm.weight" else name
            for part, part_there in NAMES.items():
                theirs = theirs.replace(part, part_there)
            parameter.copy_(weights[theirs])

    def forward(self, rows: Rows) -> Tensor:
        """Logits [B, T, V]."""
        x, mask_BHTT = self.embedding(rows.tokens), self.mask(rows.documents)
        for block in self.blocks:
            x = block(x, mask_BHTT)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def mask(self, documents_BT: Tensor) -> Tensor:
        """What is added to the logits of attention: ALiBi, and -inf on later tokens and other documents."""
        index_T = torch.arange(documents_BT.shape[1])
        distance_TT = index_T[:, None] - index_T[None, :]
        bias_HTT = -self.slope_H[:, None, None] * distance_TT
        visible_BTT = (documents_BT[:, :, None] == documents_BT[:, None, :]) & (distance_TT >= 0)
        return torch.where(visible_BTT[:, None], bias_HTT, -torch.inf)


def alibi_slopes(n_heads: int) -> Tensor:
    """The published slopes (arXiv:2108.12409), also where the heads are no power of two."""
    power = 2 ** math.floor(math.log2(n_heads))
    own = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (n_heads - power), 2)]
    return torch.tensor(own + between)


class ReferenceRun:
    """The loop by hand."""

    def __init__(self, recipe: Recipe, vocab_size: int, rows: list[Rows], weights: Mapping[str, Tensor]) -> None:
        self.recipe, self.rows = recipe, rows
        self.model = ReferenceModel(recipe, vocab_size)
        self.model.load(weights)
        matrices, gains = ([p for p in self.model.parameters() if (p.dim() == 2) is decays] for decays in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        self.step = 0

    def factor(self) -> float:
        """Of the learning rate: linear warm-up, then half a cosine."""
        recipe, step = self.recipe, self.step
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        done = (step - recipe.warmup_steps) / (len(self.rows) - recipe.warmup_steps)
        return recipe.min_lr_factor + (1 - recipe.min_lr_factor) * 0.5 * (1 + math.cos(math.pi * done))

    def steps(self, n: int) -> None:
        """The next ``n`` steps."""
        for _ in range(n):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * self.factor()
            rows = self.rows[self.step]
            loss = F.cross_entropy(self.model(rows).flatten(0, 1), rows.labels.flatten(), ignore_index=-100)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    @torch.no_grad()
    def loss(self, batches: FixedBatches) -> float:
        """Mean cross-entropy a target, nats."""
        total = n_targets = 0.0
        for batch in batches:
            rows = Rows(batch.tokens_BT, batch.labels_BT, batch.document_BT)
            logits_NV = self.model(rows).flatten(0, 1)
            total += F.cross_entropy(logits_NV, rows.labels.flatten(), ignore_index=-100, reduction="sum").item()
            n_targets += (rows.labels != -100).sum().item()
        return total / n_targets


def configuration(steps: int, folder: Path, more: Sequence[str] = ()) -> RunConfig:
    """The main example for ``steps`` steps in fp32, without checkpoints, validation at the end alone. ``more``: overrides."""
    overrides = {
        "job.dump_folder": folder,
        "training.steps": steps,
        "training.mixed_precision_param": "float32",
        "checkpoint.enable": "false",
        "validation.interval": steps + 1,
        "evaluation.enable": "false",
        "metrics.sinks": '["jsonl", "tensorboard", "plot"]',
    }
    config = load_config(CONFIG, [f"--{key}={value}" for key, value in overrides.items()] + list(more), RunConfig).config
    return resolve(config, seed=config.debug.seed or 0, device_type="cpu")


def weights_of(trainer: SlicedTrainer) -> dict[str, Tensor]:
    """Copies of the initial weights by name."""
    return {name: shard_of(parameter.detach()).clone() for name, parameter in trainer.model.named_parameters()}


def rows_of(trainer: SlicedTrainer, steps: int) -> list[Rows]:
    """The rows of each step, as ``trainer`` reads them."""
    training = trainer.config.training
    loader = build_loader(
        trainer.config.data,
        tokenizer=trainer.tokenizer,
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.global_batch_size,
        dp_rank=0,
        dp_degree=1,
        seed=trainer.config.debug.seed or 0,
    )
    return [Rows(batch.tokens_BT, batch.labels_BT, batch.document_BT) for _, batch in zip(range(steps), loader, strict=False)]


def in_turns(ours: SlicedTrainer, reference: ReferenceRun, steps: int, segment: int) -> Comparison:
    """Both to the end, in segments A B B A A B B A. The control: within a round, A's middle segments against its outer ones."""
    a, b = partial(ours.steps, segment), partial(reference.steps, segment)
    rounds: list[list[Sample]] = []
    control: list[list[Sample]] = []
    for _ in range(steps // (ROUND * segment)):
        halves = [[call(program) for program in (a, b, b, a)] for _ in range(2)]
        rounds += halves
        control.append([halves[0][0], halves[0][3], halves[1][0], halves[1][3]])
        print(f"step {ours.progress.step} of {steps}", flush=True)
    return comparison_of("titanarch", "plain PyTorch", rounds=rounds, control=control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each side, a multiple of 4 segments")
    parser.add_argument("--segment", type=int, default=5, help="steps before it is the other's turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", default="small_reference", help="name of the file in benchmarks/results; empty: none")
    options = parser.parse_args()
    if options.steps % (ROUND * options.segment) or options.steps <= RECIPE.warmup_steps:
        parser.error(f"--steps must be a multiple of {ROUND} segments and above the warm-up's {RECIPE.warmup_steps}")
    torch.set_num_threads(options.threads)
    processes = start_processes(RunConfig.model_fields["comm"].get_default(call_default_factory=True))
    if processes.device.type != "cpu":
        parser.error("this benchmark is of the CPU: hide the GPUs from it")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        config = configuration(options.steps, folder)
        ours = SlicedTrainer(config, processes, RunFolder(folder))
        reference = ReferenceRun(RECIPE, ours.tokenizer.vocab_size, rows_of(ours, options.steps), weights_of(ours))
        n_parameters = sum(p.numel() for p in reference.model.parameters())
        assert n_parameters == ours.cost.parameters, f"the reference has {n_parameters} parameters, the example {ours.cost.parameters}"
        ours.open(stack)
        comparison = in_turns(ours, reference, options.steps, options.segment)
        our_losses = ours.losses()
        their_losses = {key: reference.loss(batches) for key, batches in ours.held_out.validation_sets.items()}
    stop_processes()
    n_tokens = options.segment * ours.tokens_per_step
    summary: dict[str, Any] = {
        "parameters": n_parameters,
        "steps": options.steps,
        "tokens_per_second": {
            "titanarch": n_tokens / comparison.first_median_seconds,
            "plain PyTorch": n_tokens / comparison.second_median_seconds,
        },
        "losses": {"titanarch": our_losses, "plain PyTorch": their_losses},
        "validation_loss_difference": our_losses["validation_loss"] - their_losses["validation_loss"],
    }
    print(comparison.summary(), json.dumps(summary, indent=1), sep="\n")
    if options.record:
        print(record(options.record, [comparison, summary], settings=vars(options)))


if __name__ == "__main__":
    main()
