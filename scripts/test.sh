#!/usr/bin/env bash
# Lints, type checks and tests, in the environment that run_train.sh uses with the test packages added.
#
#   scripts/test.sh                     everything, as continuous integration does
#   scripts/test.sh tests/data -k rows  pytest alone, with these arguments
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"
choose_python test

if (($# > 0)); then
  exec "$PYTHON_BIN" -m pytest "$@"
fi

status=0 # every check runs, so that one failure does not hide another
"$PYTHON_BIN" -m ruff check . || status=1
"$PYTHON_BIN" -m ruff format --check . || status=1
"$PYTHON_BIN" -m mypy || status=1
# A file's tests stay together, since they share the processes that they start. One process leaves a second core idle.
"$PYTHON_BIN" -m pytest -n 2 --dist loadfile --no-loadscope-reorder || status=$?
exit "$status"
