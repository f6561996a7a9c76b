"""``titanarch config`` on a small root schema, and the plumbing of the command."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import titanarch
import titanarch.cli
from tests.config.small_run import SmallRun
from titanarch.cli.main import COMMANDS, main
from titanarch.config.identity import identity_hash
from titanarch.config.load import load_config
from titanarch.config.reference import reference_page
from titanarch.config.schema import json_schema
