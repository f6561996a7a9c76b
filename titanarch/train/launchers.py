"""Who started this process: what the environment of each launcher says of ranks and of the place to meet.

| launcher | rank, processes, rank on the node | meeting place |
|---|---|---|
| torchrun, accelerate, deepspeed, Kubeflow | RANK, WORLD_SIZE, LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| Open MPI's mpirun | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| srun | SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID | the step's first node, a port made of the job's number |
| Hydra's mpirun (MPICH, Intel) | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID | MASTER_ADDR, MASTER_PORT |

The first that applies counts, since a launcher may run inside another's process. MASTER_ADDR and MASTER_PORT always win.
A batch script has Slurm's variables too, without being one of several tasks: only inside a step (SLURM_STEP_ID) do they count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from titanarch.config.errors import ConfigError

FIRST_PORT, N_PORTS = 20_000, 10_000
"""Ports for Slurm's steps: below the ones that systems give to outgoing connections."""


@dataclass(frozen=True)
class Place:
    """``rank`` of ``world_size``, number ``local_rank`` of its node; process 0 listens at ``address``:``port``."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The same in the form that torch reads from the environment."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class _Names:
    """The variables of a launcher; several names of one thing in order of preference."""

    launcher: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str


_KINDS = (
    _Names("the launcher", "RANK", ("WORLD_SIZE",), "LOCAL_RANK"),
    _Names("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Names("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID"),
    _Names("mpirun", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID"),
)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What the launcher says in ``environment``; None where there is none, or this is its only process.

    Raises ConfigError where it says too little, or what cannot be.
    """
    names = next((names for names in _KINDS if names.rank in environment and _applies(names, environment)), None)
    if names is None:
        return None
    rank = _count(environment, names.launcher, names.rank)
    world_size = _count(environment, names.launcher, *names.world_size)
    local_rank = _count(environment, names.launcher, names.local_rank) if names.local_rank in environment else 0
    if rank >= world_size:
        raise ConfigError(f"{names.launcher} gives {names.rank}={rank} of {world_size} processes: ranks count from 0")
    if world_size == 1:
        return None
    address, port = _meeting_place(names.launcher, environment)
    return Place(names.launcher, rank, world_size, local_rank, address, port)


def first_host(node_list: str) -> str | None:
    """The first name of a list as Slurm writes it, such as ``gpu[003-007,12],login``; None where it cannot be read."""
    match = re.match(r"((?:[^\[\],\s]|\[[\d,-]+\])+)", node_list)
    if match is None or (match.end() < len(node_list) and node_list[match.end()] != ","):
        return None
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", match[1])


def _applies(names: _Names, environment: Mapping[str, str]) -> bool:
    return names.launcher != "srun" or "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment


def _count(environment: Mapping[str, str], launcher: str, *names: str) -> int:
    for name in names:
        text = environment.get(name)
        if text is not None:
            if not re.fullmatch(r"\d+", text):
                raise ConfigError(f"{launcher} gives {name}={text!r}: a whole number is needed")
            return int(text)
    raise ConfigError(f"{launcher} gives a rank, but no {' or '.join(names)}: set it, or start the run with ./run_train.sh")


def _meeting_place(launcher: str, environment: Mapping[str, str]) -> tuple[str, int]:
    address = environment.get("MASTER_ADDR") or (_slurm_address(environment) if launcher == "srun" else None)
    if not address:
        raise ConfigError(
            f"{launcher} gives no MASTER_ADDR: set it to the name or address of the node of process 0, alike on all processes"
        )
    if environment.get("MASTER_PORT"):
        return address, _count(environment, launcher, "MASTER_PORT")
    if launcher == "srun" and environment.get("SLURM_JOB_ID", "").isdecimal():
        step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
        return address, FIRST_PORT + (int(environment["SLURM_JOB_ID"]) + int(step if step.isdecimal() else 0)) % N_PORTS
    raise ConfigError(f"{launcher} gives no MASTER_PORT: set it to a free port of {address}, alike on all processes")


def _slurm_address(environment: Mapping[str, str]) -> str:
    """The first node of the step: task 0 runs there, unless srun was told of another distribution."""
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    lists = [name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if environment.get(name)]
    host = first_host(environment[lists[0]]) if lists else None
    if host is None:
        told = f"{lists[0]}={environment[lists[0]]!r}, in which no first node can be found" if lists else "no list of nodes"
        raise ConfigError(f"srun gives {told}: set MASTER_ADDR to the name of the node of task 0, alike for all tasks")
    return host
