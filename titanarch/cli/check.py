"""``titanarch check``: whether a component keeps the contract, on one process and on several."""

import argparse
import logging
import sys
from typing import Any

from titanarch.config.errors import ConfigError
from titanarch.testing.divided import check_divided
from titanarch.testing.findings import Finding
from titanarch.testing.kit import run_checks
from titanarch.testing.processes import RankError
from titanarch.testing.subject import D_MODEL, N_HEADS, N_LAYERS, N_TOKENS, Subject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EPILOG = f"""\
A component is checked as it is trained: {N_LAYERS} layers, {D_MODEL} wide, with {N_HEADS} heads and {N_TOKENS} tokens a row, in fp64.
Each line is a check: ok, FAIL, known (its card says why it differs), or - where it does not apply.
The exit status is 0 where none failed, 1 where one did, 2 where the component or its table is wrong.

  titanarch check mixer attention --table 'n_kv_heads = 2'
  PYTHONPATH=. titanarch check mixer mine --import mine --processes 2
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the slot, the name, and what belongs to them."""
    parser.add_argument("slot", choices=("mixer", "channel"), help="what the component is")
    parser.add_argument("name", help="the name that it is registered under")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help="a module that registers it")
    parser.add_argument("--table", action="append", default=[], metavar="TOML", help="keys of its table, as in a TOML; may be repeated")
    parser.add_argument(
        "--processes", type=_positive, default=1, metavar="N", help="check every way of dividing it among N too (default: 1)"
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Print a line a check; 1 where one failed. ConfigError where the component is unknown or refuses its table."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    subject = Subject(args.slot, args.name, table=_table(args.table), imports=tuple(args.imports))
    findings = _shown(run_checks(subject))
    if args.processes > 1:
        try:
            findings += _shown(check_divided([subject], args.processes))
        except RankError as error:
            findings += _shown([Finding(subject.name, f"{args.processes} processes", "FAIL", str(error))])
    failed = [finding for finding in findings if not finding.passed]
    print(f"{subject.name}: {len(failed)} of {len(findings)} checks failed" if failed else f"{subject.name} keeps the contract")
    return 1 if failed else 0


def _shown(findings: list[Finding]) -> list[Finding]:
    for finding in findings:
        print(finding, flush=True)
    return findings


def _table(texts: list[str]) -> dict[str, Any]:
    """The keys of ``--table``; a ConfigError where they are no TOML."""
    try:
        return tomllib.loads("\n".join(texts))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--table is no TOML: {error}; write it as in a file, such as 'n_heads = 4'") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes, which count from 1")
    return int(text)
