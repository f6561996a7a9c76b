"""What a run ran on: versions, device and commit. Never environment variables, never the machine's or the user's name."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import titanarch

PACKAGES = ("numpy", "torchao", "torchdata", "triton", "sentencepiece", "tokenizers", "pydantic", "safetensors")
GIT_SECONDS = 10


def git_state(package: Path) -> dict[str, Any]:
    """``commit`` and ``uncommitted_changes`` of the checkout that holds ``package``; nothing where it is installed.

    Nothing too where git is missing, or refuses the checkout.
    """
    root = package.parent
    if not (root / ".git").exists():
        return {}
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "uncommitted_changes": bool(answers[1])}


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_record(*, device: torch.device, n_processes: int) -> dict[str, Any]:
    """The record kept with each start of a run and in ``result.json``, as plain JSON values."""
    record: dict[str, Any] = {
        "titanarch": titanarch.__version__,
        **git_state(Path(titanarch.__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "torch": torch.__version__,
        "packages": package_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device_type": device.type,
        "n_processes": n_processes,
        "n_threads": torch.get_num_threads(),
    }
    if torch.version.cuda:
        record["cuda"] = torch.version.cuda
    if torch.version.hip:
        record["rocm"] = torch.version.hip
    return record
