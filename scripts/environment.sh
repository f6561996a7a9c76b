# shellcheck shell=bash
# The Python environment that run_train.sh and scripts/test.sh run in. Sourced by them, never run.
#
#   choose_python run    sets PYTHON_BIN to an interpreter that can train
#   choose_python test   the same, with what the tests need on top
#
# Read from the environment:
#   TITANARCH_PYTHON   an interpreter that has this copy of titanarch and torch; it is used as it is
#   VIRTUAL_ENV        an active environment; used when it has them
#   PYTHON             the interpreter that makes .venv when neither serves; python3 unless given
#   TORCH_INDEX_URL    a package index that torch comes from (CPU-only, ROCm, ...); pip's own unless given

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
ENVIRONMENT="$REPOSITORY/.venv"
PYTHON_BIN=""

say() { printf 'titanarch: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

# Whether interpreter $1 finds this copy of titanarch and the modules $2... Nothing is imported: torch alone takes seconds.
has_modules() {
  "$1" - "$REPOSITORY" "${@:2}" 2>/dev/null <<'PYTHON'
import importlib.util
import os
import sys

sys.path[:] = [folder for folder in sys.path if folder]  # the current folder would always serve titanarch
package = importlib.util.find_spec("titanarch")
here = os.path.join(os.path.realpath(sys.argv[1]), "titanarch", "__init__.py")
found = package is not None and package.origin is not None and os.path.realpath(package.origin) == here
sys.exit(0 if found and all(map(importlib.util.find_spec, sys.argv[2:])) else 1)
PYTHON
}

# What .venv must have been installed from to be up to date.
wanted_stamp() {
  printf '%s\n' "$REPOSITORY"
  cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/constraints.txt"
}

# Whether .venv serves purpose $1: its last installation finished, from the same files and the wanted torch index.
is_current() {
  local stamp="$ENVIRONMENT/titanarch-$1.stamp"
  [[ -x "$ENVIRONMENT/bin/python" && -f "$stamp" ]] || return 1
  [[ "$(<"$stamp")" == "$(wanted_stamp)" ]] || return 1
  [[ -z "${TORCH_INDEX_URL:-}" || "$TORCH_INDEX_URL" == "$(recorded_index)" ]]
}

recorded_index() { cat "$ENVIRONMENT/titanarch-torch-index" 2>/dev/null || true; }

# Sets BASE_PYTHON to an interpreter of version 3.10 or newer, or says what to do.
find_base_python() {
  BASE_PYTHON="${PYTHON:-python3}"
  command -v "$BASE_PYTHON" >/dev/null || fail "no '$BASE_PYTHON' found; install Python 3.10 or newer, or set PYTHON to its path"
  local version
  version="$("$BASE_PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')" || fail "'$BASE_PYTHON' does not run; set PYTHON to a working Python 3.10 or newer"
  "$BASE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$BASE_PYTHON' is Python $version; titanarch needs 3.10 or newer: set PYTHON to a newer interpreter, as in PYTHON=python3.12"
}

# Takes the lock on file descriptor 9 for this shell and its children. Through Python, because not every system has flock(1).
lock_environment() {
  exec 9>>"$ENVIRONMENT/titanarch.lock"
  "$1" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.stderr.write("titanarch: another launch is preparing .venv; waiting for it\n")
    fcntl.flock(9, fcntl.LOCK_EX)
' || fail "cannot lock $ENVIRONMENT/titanarch.lock"
}

# Without compiling: that takes longer than the rest, and Python does it for the few modules that a run imports.
pip_install() {
  "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile \
    --constraint "$REPOSITORY/constraints.txt" "$@" >&2 ||
    fail "pip could not install; the lines above say why. The same command tries again"
}

install_titanarch() {
  local target="$1" index source=()
  index="${TORCH_INDEX_URL:-$(recorded_index)}"
  if [[ -n "$index" ]]; then
    # torch alone from there: such indexes hold few versions of anything else. pip would keep another build of the same version.
    [[ "$index" == "$(recorded_index)" ]] || source=(--force-reinstall)
    pip_install "${source[@]+"${source[@]}"}" --no-deps --index-url "$index" torch
    source=(--extra-index-url "$index")
  fi
  (cd "$REPOSITORY" && pip_install "${source[@]+"${source[@]}"}" --editable "$target")
  if [[ -n "$index" ]]; then
    printf '%s\n' "$index" >"$ENVIRONMENT/titanarch-torch-index"
  fi
}

# Brings .venv up to date for purpose $1 (run, test). One launch at a time; the stamp is written last, so a stop midway leaves none.
make_environment() {
  local purpose="$1" target="." purposes=(run) each
  if is_current "$purpose"; then return; fi
  if [[ "$purpose" == test ]]; then
    target=".[dev,reference]"
    purposes=(run test)
  fi
  mkdir -p "$ENVIRONMENT"
  BASE_PYTHON="$ENVIRONMENT/bin/python"
  "$BASE_PYTHON" -c '' 2>/dev/null || find_base_python
  lock_environment "$BASE_PYTHON"
  if ! is_current "$purpose"; then
    say "preparing $ENVIRONMENT; the first time this takes a few minutes"
    rm -f "$ENVIRONMENT"/titanarch-*.stamp
    if ! "$ENVIRONMENT/bin/python" -m pip --version >/dev/null 2>&1; then
      find_base_python
      "$BASE_PYTHON" -m venv "$ENVIRONMENT" >&2 || fail "'$BASE_PYTHON -m venv' failed; on Debian and Ubuntu the package python3-venv brings it"
      "$ENVIRONMENT/bin/python" -m pip --version >/dev/null 2>&1 || fail "$ENVIRONMENT is broken: it has no pip. Remove it and launch again"
    fi
    install_titanarch "$target"
    for each in "${purposes[@]}"; do
      wanted_stamp >"$ENVIRONMENT/titanarch-$each.stamp.new"
      mv "$ENVIRONMENT/titanarch-$each.stamp.new" "$ENVIRONMENT/titanarch-$each.stamp"
    done
  fi
  exec 9>&-
}

choose_python() {
  local purpose="$1" modules=(torch)
  if [[ "$purpose" == test ]]; then
    modules+=(hypothesis mypy pytest pytest_timeout rotary_embedding_torch ruff transformers x_transformers)
  fi
  if [[ -n "${TITANARCH_PYTHON:-}" ]]; then
    PYTHON_BIN="$(command -v "$TITANARCH_PYTHON")" || fail "TITANARCH_PYTHON=$TITANARCH_PYTHON does not exist"
    has_modules "$PYTHON_BIN" "${modules[@]}" ||
      fail "TITANARCH_PYTHON=$TITANARCH_PYTHON lacks this copy of titanarch or one of: ${modules[*]}. Install $REPOSITORY there, or unset TITANARCH_PYTHON"
    return
  fi
  if [[ -n "${VIRTUAL_ENV:-}" && ! "$VIRTUAL_ENV" -ef "$ENVIRONMENT" ]]; then
    PYTHON_BIN="$VIRTUAL_ENV/bin/python"
    if has_modules "$PYTHON_BIN" "${modules[@]}"; then return; fi
    say "the active environment $VIRTUAL_ENV lacks this copy of titanarch or one of: ${modules[*]}; using $ENVIRONMENT"
  fi
  make_environment "$purpose"
  PYTHON_BIN="$ENVIRONMENT/bin/python"
}
