"""The launch files in scripts/: the Slurm script runs against stand-ins of Slurm, the YAML files are read as their systems do."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nodes import QUICK, REPOSITORY, environment, losses_in, unchecked_python
from titanarch.config.load import load_config
from titanarch.train.run_config import RunConfig

SCRIPTS = REPOSITORY / "scripts"

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") printf '%s\\n' ${NODES:-node003 node004} ;;
*) echo "$*" >>"$RECORD" ;;
esac
"""

SRUN = """#!/usr/bin/env bash
# One task a node, side by side. SIGUSR1 is handed on to all; at SIGTERM the real one kills them. The status is the worst one's.
all="$*"
echo "srun ${all%%bash*}" >>"$RECORD"
while [[ "$1" == --* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -KILL "${pids[@]}"' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  code=0
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
  wait "$pid" || code=$?
  ((code > status)) && status=$code
done
exit "$status"
"""

LAUNCHER = """#!/usr/bin/env bash
python="$(basename "$TITANARCH_PYTHON")"
echo "node $NODE_RANK of $NNODES at $RDZV_ENDPOINT, $NGPU processes, $MAX_RESTARTS restarts, $python: $*" >>"$RECORD"
sleep "${SECONDS_OF_TRAINING:-0}" &
trap 'kill $!; exit 138' USR1
wait $!
exit "${STATUS:-0}"
"""

ENVIRONMENT = """
choose_python() { PYTHON_BIN="$(command -v bash)"; }
"""


@dataclass
class Cluster:
    """A repository whose launcher only writes down how it is called, and a PATH with stand-ins of srun and scontrol."""

    root: Path

    def start(self, *arguments: str, submit_folder: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        folder = submit_folder or self.root / "repository"
        slurm = {
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "4211",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[003-004]",
            "SLURM_GPUS_ON_NODE": "4",
        }
        inherited = {name: value for name, value in os.environ.items() if name not in ("NGPU", "MAX_RESTARTS")}
        paths = {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "RECORD": str(self.root / "record")}
        return subprocess.Popen(
            ["bash", str(self.root / "spool"), *arguments],  # Slurm runs a copy of the script from a folder of its own
            env={**inherited, **slurm, **paths, **variables},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def record(self) -> list[str]:
        file = self.root / "record"
        return sorted(file.read_text().splitlines()) if file.exists() else []

    def wait_for_launchers(self, n: int) -> None:
        deadline = time.monotonic() + 60
        while sum(line.startswith("node") for line in self.record()) < n:
            assert time.monotonic() < deadline, self.record()
            time.sleep(0.02)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    executable(tmp_path / "bin/scontrol", SCONTROL)
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "repository/run_train.sh", LAUNCHER)
    executable(tmp_path / "repository/scripts/environment.sh", ENVIRONMENT)
    executable(tmp_path / "spool", (SCRIPTS / "slurm.sh").read_text())
    return Cluster(tmp_path)


SRUN_CALL = "srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 "
LAUNCHES = [f"node {n} of 2 at node003:24211, 4 processes, 2 restarts, bash: --config a b.toml" for n in (0, 1)]


def test_slurm_starts_one_launcher_a_node(cluster: Cluster) -> None:
    _, err = (job := cluster.start("--config", "a b.toml")).communicate(timeout=400)
    assert job.returncode == 0, err
    assert cluster.record() == [*LAUNCHES, SRUN_CALL]


def test_slurm_passes_a_failure_on(cluster: Cluster) -> None:
    _, err = (job := cluster.start("--config", "a b.toml", STATUS="3")).communicate(timeout=400)
    assert job.returncode == 3, err
    assert cluster.record() == [*LAUNCHES, SRUN_CALL], "a run that breaks is not queued again"


@pytest.mark.parametrize(("restarts", "queued"), [("0", True), ("5", False)])
def test_slurm_queues_again_before_the_time_limit(cluster: Cluster, restarts: str, queued: bool) -> None:
    variables = {"SECONDS_OF_TRAINING": "300", "SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": "5"}
    job = cluster.start("--config", "a b.toml", **variables)
    cluster.wait_for_launchers(2)
    job.send_signal(signal.SIGUSR1)
    started = time.monotonic()
    _, err = job.communicate(timeout=400)
    assert time.monotonic() - started < 30
    assert job.returncode == (0 if queued else 1), err
    assert cluster.record() == [*LAUNCHES, *(["requeue 4211"] if queued else []), SRUN_CALL]
    assert "the time limit is near" in err


@pytest.mark.parametrize(("status", "queued"), [("138", True), ("143", True), ("137", False)])
def test_slurm_queues_again_what_was_told_to_end(cluster: Cluster, status: str, queued: bool) -> None:
    """A preemption signals the tasks, and not this script."""
    _, err = (job := cluster.start("--config", "a b.toml", STATUS=status)).communicate(timeout=400)
    assert job.returncode == (0 if queued else int(status)), err
    assert ("requeue 4211" in cluster.record()) == queued


def test_slurm_needs_the_repository(cluster: Cluster) -> None:
    _, err = (job := cluster.start("--config", "a.toml", submit_folder=cluster.root)).communicate(timeout=400)
    assert job.returncode == 2
    assert "submit from the repository, or set TITANARCH_HOME" in err
    _, err = (job := cluster.start("--config", "a.toml", submit_folder=cluster.root, TITANARCH_HOME="repository")).communicate(timeout=400)
    assert job.returncode == 0, err


def test_slurm_resumes_a_real_run(cluster: Cluster, tmp_path: Path) -> None:
    """The whole way: trained, warned, saved, queued again, started by the same command, finished. No step is made twice."""
    run = tmp_path / "run"
    arguments = ("--config", "train_configs/debug.toml", f"--job.dump_folder={run}", "--checkpoint.interval=1000000", *QUICK)
    variables = environment(
        SLURM_JOB_NUM_NODES="1", NGPU="1", TITANARCH_HOME=str(REPOSITORY), TMPDIR=str(tmp_path), MAX_RESTARTS="1", NODES="localhost"
    ) | {"TITANARCH_PYTHON": unchecked_python(tmp_path)}
    job = cluster.start(*arguments, "--training.steps=100000", **{**variables, "PATH": f"{cluster.root / 'bin'}:{os.environ['PATH']}"})
    deadline = time.monotonic() + 100
    while max(losses_in(run), default=0) < 3:
        assert time.monotonic() < deadline, job.communicate(timeout=1)
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=400)
    assert job.returncode == 0, err
    assert "requeue 4211" in cluster.record()
    assert "titanarch: ended by SIGUSR1" in err
    last = max(losses_in(run))
    assert [path.parent.name for path in run.glob("checkpoints/*/COMMITTED.json")] == [f"step-{last:08d}"]
    again = cluster.start(
        *arguments,
        f"--training.steps={last + 2}",
        **{**variables, "PATH": f"{cluster.root / 'bin'}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": "1"},
    )
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    assert re.search(rf"resumed from .*step-0*{last} at step {last}", out + err), out + err
    assert (run / "result.json").is_file()


def test_slurm_asks_for_what_the_script_relies_on() -> None:
    text = (SCRIPTS / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"].startswith("B:USR1@"), "the script, not its step, is warned"
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append", "a requeued job goes on in the same file"
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= set(options)
    first_command = next(n for n, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in text.splitlines()[first_command:]), "sbatch reads no options after a command"


def read(name: str) -> Any:
    return yaml.safe_load((SCRIPTS / name).read_text())


def run_as_container(pod: dict[str, Any], operator: dict[str, str], folder: Path) -> str:
    """What the command of a container does with a launcher that tells how it is called."""
    (container,) = pod["containers"]
    variables = {each["name"]: each.get("value", "10.0.0.7") for each in container["env"]}
    executable(folder / "run_train.sh", LAUNCHER)
    command = [*container["command"], *container["args"]]
    fixed = {"PATH": os.environ["PATH"], "RECORD": str(folder / "record"), "TITANARCH_PYTHON": "python"}
    subprocess.run(command, env={**fixed, **variables, **operator}, cwd=folder, check=True)
    return (folder / "record").read_text().splitlines()[-1]


def test_kubernetes_job(tmp_path: Path) -> None:
    job = read("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    n_nodes = sum(each["replicas"] for each in replicas.values())
    for rank, each in enumerate(replicas.values()):
        assert each["restartPolicy"] == "OnFailure", "so that a container that failed resumes the run"
        pod = each["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator sets its variables in this container"
        variables = {entry["name"]: entry for entry in container["env"]}
        assert variables["NNODES"]["value"] == str(n_nodes)
        assert variables["NGPU"]["value"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert variables["LOCAL_ADDR"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        assert all(isinstance(entry.get("value", ""), str) for entry in container["env"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "persistentVolumeClaim" in mounts["/opt/titanarch/outputs"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        user = re.search(r"--uid (\d+)", (REPOSITORY / "Dockerfile").read_text())
        assert user is not None
        assert {pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]} == {int(user[1])}
        operator = {"RANK": str(rank), "MASTER_ADDR": "titanarch-master-0", "MASTER_PORT": "23456"}
        assert run_as_container(pod, operator, tmp_path) == (
            f"node {rank} of 2 at titanarch-master-0:23456, 8 processes, 2 restarts, python: "
            "--config train_configs/small_alibi.toml --job.dump_folder outputs/kubernetes"
        )


def test_skypilot_job(tmp_path: Path) -> None:
    job = read("skypilot.yaml")
    assert job["resources"]["use_spot"] is True
    recovery = job["resources"]["job_recovery"]
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert recovery["max_restarts_on_errors"] > 0
    (mount,) = job["file_mounts"]
    assert job["file_mounts"][mount] == {"source": "s3://${BUCKET}", "mode": "MOUNT_CACHED"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=job[part], text=True, check=True)
    executable(tmp_path / "run_train.sh", LAUNCHER + 'echo "$LOCAL_ADDR" >>"$RECORD"\n')
    (tmp_path / "run_train.sh").write_text((tmp_path / "run_train.sh").read_text().replace('exit "${STATUS:-0}"\n', ""))
    sky = {
        "SKYPILOT_NUM_NODES": str(job["num_nodes"]),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.3\n10.0.0.9",
    }
    fixed = {"PATH": os.environ["PATH"], "RECORD": str(tmp_path / "record"), "TITANARCH_PYTHON": "python"}
    subprocess.run(["bash", "-c", job["run"]], env={**fixed, **job["envs"], **sky}, cwd=tmp_path, check=True)
    called, address = (tmp_path / "record").read_text().splitlines()
    assert address == "10.0.0.9"
    assert called == (
        "node 1 of 2 at 10.0.0.3:29400, 8 processes, 2 restarts, python: --config train_configs/small_alibi.toml "
        f"--job.dump_folder {mount}/spot --checkpoint.folder s3://titanarch-runs/spot/checkpoints"
    )


@pytest.mark.parametrize("name", ["slurm.sh", "environment.sh", "../run_train.sh"])
def test_shell_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_overrides_in_the_files_are_keys() -> None:
    """The configuration and the keys that the files name are accepted."""
    overrides = ["--job.dump_folder=/outputs/spot", "--checkpoint.folder=s3://a/b"]
    config = load_config(REPOSITORY / "train_configs/small_alibi.toml", overrides, RunConfig).config
    assert (config.job.dump_folder, config.checkpoint.folder) == ("/outputs/spot", "s3://a/b")
