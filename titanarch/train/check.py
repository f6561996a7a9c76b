"""What can be refused before launch, on any machine, all at once."""

import math
from collections.abc import Callable
from typing import Any

import torch

from titanarch.config.errors import ConfigError, Problem
from titanarch.contract.mixer import BaseMixer
from titanarch.contract.model import MODELS, Model
from titanarch.data.layout import RunLayout
from titanarch.data.tokenizers import build_tokenizer
from titanarch.evaluate.config import check_splits
from titanarch.parallel.check import decide_division, technique_problems
from titanarch.parallel.compile import GRAPHS_A_BLOCK
from titanarch.parallel.mesh import Degrees, resolve_degrees
from titanarch.train.budget import Budget, build_budget
from titanarch.train.metrics.config import check_sinks
from titanarch.train.profiling import check_profiling
from titanarch.train.run_config import RunConfig
from titanarch.train.schedules import build_schedule


def check_run(config: RunConfig, *, world_size: int, device_type: str) -> None:
    """Raise one ConfigError with every reason why ``config`` cannot run on ``world_size`` processes."""
    problems: list[Problem] = []

    def collect(check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return check(*args, **options)
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    degrees: Degrees | None = collect(resolve_degrees, config.parallelism, world_size)
    if degrees is not None:
        n = degrees.data_parallel
        layouts = collect(RunLayout, config.training.run_phases(n), 0, n)
        if layouts is not None and config.data.mode == "streamed":
            collect(layouts.n_streams, config.data.streams, n_workers=config.data.workers)
    collect(check_sinks, config.metrics)
    collect(check_profiling, config.profiling, device_type=device_type)
    collect(check_splits, config.data, validation=config.validation, evaluation=config.evaluation)
    collect(check_phases, config)
    collect(_check_schedule, config)
    collect(_check_best, config)
    collect(_check_bad_gradients, config)
    collect(_check_model, config, degrees, device_type)
    if problems:
        raise ConfigError(*problems)


def vocabulary(config: RunConfig, tokenizer_size: int) -> int:
    """Rows of the embedding; a ConfigError where the model's are fewer than the tokenizer's tokens."""
    needed = tokenizer_size + config.model.extra_tokens()
    wanted = getattr(config.model, "vocab_size", None) or needed
    if wanted < needed:
        extra = f" and {config.model.extra_tokens()} of the model's own" if config.model.extra_tokens() else ""
        message = f"{wanted} rows are fewer than the tokenizer's {tokenizer_size} tokens{extra}; raise it or remove it"
        raise ConfigError(Problem(message, "model.vocab_size"))
    return int(wanted)


def meta_model(config: RunConfig, vocab_size: int) -> Model:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return MODELS.of(config.model)(config.model, vocab_size, config.training.seq_len)


def kernel_problems(model: Model, device_type: str, *, compiled: bool) -> list[Problem]:
    """Why kernels that tables ask for by name cannot run on devices of this type."""
    mixers = (m for m in model.modules() if isinstance(m, BaseMixer))
    reasons = dict.fromkeys(f"{type(m).__qualname__}: {why}" for m in mixers if (why := m.why_not_on(device_type, compiled=compiled)))
    return [Problem(reason, "model.mixers") for reason in reasons]


def check_phases(config: RunConfig) -> None:
    """Rows of several lengths are parts of the longest or cut from a stream one after the other, so the packing has to allow that."""
    phases = config.training.run_phases(1)
    shapes = {(phase.seq_len, phase.local_batch_size) for phase in phases.parts}
    if config.compile.enable and len(shapes) > GRAPHS_A_BLOCK:
        message = f"{len(shapes)} shapes of micro-batches are more than the {GRAPHS_A_BLOCK} that blocks are compiled for"
        raise ConfigError(Problem(f"{message}: give phases the same seq_len and local_batch_size, or do not compile", "training.phases"))
    reasons = {
        ("indexed", "padded"): "'padded' fills up what a document leaves of the longest rows, and shorter rows, parts of these, would be "
        "padding alone; use best_fit or concat",
        ("streamed", "best_fit"): "'best_fit' packs a group of a stream's documents for rows of one length; use concat or indexed data",
    }
    reason = reasons.get((config.data.mode, config.data.packing))
    if phases.changes_length and reason:
        raise ConfigError(Problem(f"{reason}, or give training.phases rows of training.seq_len", "data.packing"))


def _check_schedule(config: RunConfig) -> None:
    build_schedule(config.lr_scheduler, _budget(config))


def _budget(config: RunConfig) -> Budget:
    training = config.training
    return build_budget(steps=training.steps, tokens=training.tokens, minutes=training.minutes, phases=training.run_phases(1))


def _check_best(config: RunConfig) -> None:
    """The best checkpoints are told by losses, so at least one before the end must have a loss."""
    checkpoint, validation, key = config.checkpoint, config.validation, "checkpoint.keep_best_k"
    if not checkpoint.enable or checkpoint.keep_best_k == 0:
        return
    if not validation.enable:
        raise ConfigError(Problem("they are told by the validation loss, and validation.enable = false; set it to true, or this to 0", key))
    total, meeting = _budget(config).total_steps, math.lcm(checkpoint.interval, validation.interval)
    if total is not None and meeting >= total:
        message = (
            f"no checkpoint of a run of {total} steps would have a validation loss but its last: checkpoint.interval = "
            f"{checkpoint.interval} and validation.interval = {validation.interval} first meet at step {meeting}; "
            "make one a multiple of the other, or set this to 0"
        )
        raise ConfigError(Problem(message, key))


def _check_bad_gradients(config: RunConfig) -> None:
    """A run that may go back needs something to go back to."""
    actions = {"bad_gradients.nonfinite": config.bad_gradients.nonfinite, "bad_gradients.spike": config.bad_gradients.spike}
    if not config.checkpoint.enable:
        message = "'roll_back' goes back to a checkpoint: set checkpoint.enable = true, or use 'skip' or 'stop'"
        problems = [Problem(message, key) for key, action in actions.items() if action == "roll_back"]
        if problems:
            raise ConfigError(*problems)


def _check_model(config: RunConfig, degrees: Degrees | None, device_type: str) -> None:
    """``degrees``: None where they are wrong themselves."""
    tokenizer = build_tokenizer(config.data.tokenizer)
    model = meta_model(config, vocabulary(config, tokenizer.vocab_size))
    longest, problems = model.max_length(), []
    if longest is not None:
        validated = {"training.seq_len": config.training.seq_len}
        problems += [
            Problem(
                f"{n} tokens are more than the {longest} positions of the model's table; shorten it, or raise the table's max_length", key
            )
            for key, n in validated.items()
            if n > longest
        ]
    refused = {type(m).__qualname__ for m in model.modules() if isinstance(m, BaseMixer) and not m.accepts_packed_rows}
    problems += [
        Problem(f"{name} would mix the documents packed into one row; set mix_documents = true to allow it", "model.mixers")
        for name in refused
    ]
    problems += kernel_problems(model, device_type, compiled=config.compile.enable)
    if degrees is not None:
        found: list[Problem] = []
        for seq_len in {phase.seq_len: None for phase in config.training.run_phases(1).parts}:
            try:
                decide_division(model, config.parallelism, degrees, seq_len=seq_len, device_type=device_type)
            except ConfigError as error:
                found += error.problems
            found += technique_problems(
                model,
                activation_checkpoint=config.activation_checkpoint,
                compile_config=config.compile,
                float8=config.quantize.linear.float8,
                parallelism=config.parallelism,
                degrees=degrees,
                seq_len=seq_len,
                device_type=device_type,
            )
        problems += dict.fromkeys(found)
    if problems:
        raise ConfigError(*problems)
