"""``titanarch eval``: measure a run's model on the validation documents, as at the end of training or otherwise."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from titanarch.checkpoint.errors import CheckpointError
from titanarch.cli.arguments import layout_of
from titanarch.evaluate.config import EvaluationConfig
from titanarch.evaluate.evaluation import EvaluationResult, evaluate, require_readable
from titanarch.evaluate.evaluator import MAIN_TABLE
from titanarch.parallel.config import CommConfig
from titanarch.train.metrics.files import write_json
from titanarch.train.metrics.results import heading, table_lines
from titanarch.train.processes import Processes, start_processes, stop_processes
from titanarch.train.setup import OpenRun, open_run

RESULT_FILE = "evaluation.json"

_EPILOG = """\
processes:
  --parallelism.KEY VALUE   how the model lies on the processes of a launcher, such as
                            --parallelism.context_parallel_degree 4; unless given, each has rows of its own
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the run, the checkpoint, and what may differ from the run's [evaluation] section."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the folder of the run (its job.dump_folder)")
    parser.add_argument("--step", type=_natural, default=-1, help="step of the checkpoint; the newest one unless given")
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N,...", help="context lengths, tokens; default: evaluation.lengths of the run"
    )
    parser.add_argument("--max-tokens", type=_natural, metavar="N", help="targets a length and rule, 0 for all; default: that of the run")
    parser.add_argument("--batch-tokens", type=_positive, metavar="N", help="tokens a forward, bounds the memory; default: that of the run")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false", default=None, help="leave the n-gram models out")
    parser.set_defaults(takes_config=True)
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, and write evaluation.json in the run. ConfigError where the run cannot be evaluated."""
    parallelism = layout_of(args.config_arguments, "eval")
    processes = start_processes(CommConfig())
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("titanarch.evaluate").setLevel(logging.INFO if processes.is_main else logging.WARNING)
    try:
        opened = open_run(args.run, processes, step=args.step, parallelism=parallelism)
        config = _with_arguments(opened.config.evaluation, args)
        if args.lengths:
            require_readable(opened.model, args.lengths)
        result = _evaluate(opened, processes, config)
        if processes.is_main:
            print(f"{args.run}, step {opened.step}\n")
            print(_shown(result))
            setting = config.model_dump(mode="json", exclude={"enable"})
            write_json(args.run / RESULT_FILE, {"step": opened.step, "setting": setting, **result.to_json()})
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stop_processes(processes)
    return 0


def _with_arguments(config: EvaluationConfig, args: argparse.Namespace) -> EvaluationConfig:
    """The run's section with what the command line gives; the arguments' types keep the section's rules."""
    given: dict[str, Any] = {name: getattr(args, name) for name in ("lengths", "max_tokens", "batch_tokens", "baselines")}
    return config.model_copy(update={name: value for name, value in given.items() if value is not None})


def _evaluate(opened: OpenRun, processes: Processes, config: EvaluationConfig) -> EvaluationResult:
    return evaluate(
        opened.model,
        config=config,
        data=opened.config.data,
        tokenizer=opened.tokenizer,
        train_seq_len=opened.config.training.seq_len,
        device=processes.device,
        dp_rank=opened.mesh.data_rank,
        dp_degree=opened.mesh.degrees.data_parallel,
        reduce=opened.mesh.sum_over_data,
    )


def _shown(result: EvaluationResult) -> str:
    """Every table under its name, the main one first."""
    names = sorted(result.tables, key=lambda name: (name != MAIN_TABLE, name))
    return "\n\n".join("\n".join([heading(name), "", *table_lines(result.tables[name])]) for name in names)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1")
    return int(text)


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(_positive(part.strip()) for part in text.split(","))
    if len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError(f"'{text}' names a length twice")
    return lengths
