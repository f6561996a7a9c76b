"""The processes of other launchers: what each sets, as their sources and manuals say, and runs of two processes under it."""

import os
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.nodes import QUICK, environment, losses_in
from tests.train.runs import run_forks
from titanarch.config.errors import ConfigError
from titanarch.train.launchers import FIRST_PORT, N_PORTS, Place, find_place, first_host
from titanarch.train.processes import _gpu

MEETING = {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29501"}

ACCELERATE = {  # accelerate launch hands over to torchrun, and adds settings of its own
    **MEETING,
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}
DEEPSPEED = {**MEETING, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
KUBEFLOW = {**MEETING, "RANK": "3", "WORLD_SIZE": "4", "PET_NODE_RANK": "3", "PET_NNODES": "4"}  # a process a pod: no local rank
SRUN = {
    "SLURM_JOB_ID": "71234",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_NODELIST": "gpu[001,003-006]",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",  # the job's
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "PMI_RANK": "3",  # of srun --mpi=pmi2
    "PMI_SIZE": "4",
}
OPEN_MPI = {
    **MEETING,
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "SLURM_STEP_ID": "0",  # its daemons are started by srun
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
}
HYDRA = {**MEETING, "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "local_rank", "address", "port"),
    [
        (ACCELERATE, 1, "10.0.0.3", 29501),
        (DEEPSPEED, 1, "10.0.0.3", 29501),
        (KUBEFLOW, 0, "10.0.0.3", 29501),
        (SRUN, 1, "gpu003", FIRST_PORT + (71234 + 2) % N_PORTS),
        ({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}, 1, "head", 1234),
        ({**without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"), "SLURM_NTASKS": "4"}, 1, "gpu001", FIRST_PORT + 1236),
        (OPEN_MPI, 1, "10.0.0.3", 29501),
        (HYDRA, 1, "10.0.0.3", 29501),
    ],
    ids=["accelerate", "deepspeed", "kubeflow", "srun", "srun with a place", "srun of old", "open mpi", "hydra"],
)
def test_the_place_of_a_process(variables: dict[str, str], local_rank: int, address: str, port: int) -> None:
    place = find_place(variables)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.address, place.port) == (3, 4, local_rank, address, port)
    assert find_place(place.variables()) == Place("the launcher", 3, 4, local_rank, address, port)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        without(SRUN, "SLURM_STEP_ID", "PMI_RANK"),  # a batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
    ids=["nobody", "a check", "one process", "a batch script", "a shell"],
)
def test_a_process_alone(variables: dict[str, str]) -> None:
    assert find_place(variables) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (without(DEEPSPEED, "WORLD_SIZE"), "gives a rank, but no WORLD_SIZE: set it, or start the run with ./run_train.sh"),
        ({**DEEPSPEED, "WORLD_SIZE": "3"}, "RANK=3 of 3 processes: ranks count from 0"),
        ({**DEEPSPEED, "RANK": "first"}, "RANK='first': a whole number is needed"),
        (without(DEEPSPEED, "MASTER_ADDR"), "no MASTER_ADDR: set it to the name or address of the node of process 0"),
        (without(OPEN_MPI, "MASTER_PORT"), "Open MPI gives no MASTER_PORT: set it to a free port of 10.0.0.3"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[a"}, r"SLURM_STEP_NODELIST='gpu\[a', in which no first node can be found: set MASTER_ADDR"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "srun gives no list of nodes: set MASTER_ADDR"),
    ],
)
def test_too_little_is_told(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("tux5", "tux5"),
        ("login,gpu[1-3]", "login"),
        ("gpu[003-007,12],login", "gpu003"),
        ("rack[0-3]node[07-15]", "rack0node07"),
        ("a-b.c[2]", "a-b.c2"),
        ("", None),
        ("gpu[", None),
        ("gpu[x-y]", None),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str | None) -> None:
    assert first_host(nodes) == first


def as_deepspeed(rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Its launcher puts an argument before the script's own."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [f"--local_rank={rank}"], {**variables, "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}


def as_srun(rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "no-such-node7"}
    job = {"SLURM_JOB_ID": str(port - FIRST_PORT), "SLURM_JOB_NODELIST": "no-such-node7", "SLURM_NTASKS": "2"}
    return [], {**step, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}


@pytest.mark.parametrize("launcher", [as_deepspeed, as_srun])
def test_two_processes_of_another_launcher_train(tmp_path: Path, launcher: object) -> None:
    assert callable(launcher)
    port = FIRST_PORT + os.getpid() % N_PORTS if launcher is as_srun else free_port()
    arguments = ["train", "--config", "train_configs/debug.toml", f"--job.dump_folder={tmp_path}/run", "--training.steps=2", *QUICK]
    lives = []
    for rank in (0, 1):
        before, variables = launcher(rank, port)
        lives.append(([*before, *arguments, "--checkpoint.enable=false"], environment(**variables)))
    ends = run_forks(lives)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert sorted(losses_in(tmp_path / "run")) == [1, 2]
    assert '"n_processes": 2' in (tmp_path / "run/result.json").read_text()
    assert ends[1].stdout == "", "only process 0 shows the result"


@pytest.mark.parametrize(
    ("local_rank", "n_gpus", "under_torchrun", "gpu"),
    [(0, 8, True, 0), (5, 8, True, 5), (5, 1, False, 0), (5, 1, True, None), (8, 8, False, None)],
)
def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch, local_rank: int, n_gpus: int, under_torchrun: bool, gpu: int | None) -> None:
    """Schedulers may show each process only its own GPU; torchrun shows all."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    place = Place("the launcher", 5, 16, local_rank, "10.0.0.3", 29501)
    if gpu is None:
        with pytest.raises(ConfigError, match=rf"process {local_rank} of this node has no GPU: there are {n_gpus}; start as many"):
            _gpu(place, n_gpus)
    else:
        assert _gpu(place, n_gpus) == gpu
        assert _gpu(None, n_gpus) == 0
