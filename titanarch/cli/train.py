"""``titanarch train``: run a configuration, on the processes that torchrun or another launcher started."""

import argparse
import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import record

from titanarch.checkpoint.errors import CheckpointError
from titanarch.cli.arguments import add_config_arguments, load_from_arguments
from titanarch.plan.fit import TracingPlanner
from titanarch.train.guard import BadGradientError
from titanarch.train.launch import train
from titanarch.train.memory_report import OutOfMemory
from titanarch.train.metrics.results import print_result
from titanarch.train.run_config import RunConfig
from titanarch.train.stopping import ToldToEnd
from titanarch.train.watch import LostProcessError

OUT_OF_MEMORY_STATUS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        outcome = record(train)(load_from_arguments(args, RunConfig), TracingPlanner())
    except (CheckpointError, LostProcessError, BadGradientError) as error:
        print(error, file=sys.stderr)
        return 1
    except ToldToEnd as told:
        if str(told):
            print(told, file=sys.stderr)
        return told.status
    except OutOfMemory as error:
        print(error, file=sys.stderr)
        return OUT_OF_MEMORY_STATUS
    assert outcome is not None, "record returns what train does, and raises what it raises"
    result, is_main = outcome
    if is_main:
        print_result(result)
    return 0
