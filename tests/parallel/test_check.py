"""What cannot be divided is refused before launch: every conflict at once, with its key, and exit status 2."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import titanarch.models.components  # noqa: F401 (registers all)
from tests.distributed import run_distributed
from tests.parity.external import RunningMean
from tests.train.runs import write_config
from titanarch.cli.main import main
from titanarch.config.registry import Registry
from titanarch.contract.channel import CHANNELS
from titanarch.contract.mixer import MIXERS, SequenceMixer
from titanarch.contract.norm import NORMS
from titanarch.contract.position import ABSOLUTE_POSITIONS, RELATIVE_POSITIONS
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ParallelismConfig
from titanarch.parallel.mesh import Degrees, resolve_degrees

PACKAGE = Path(__file__).resolve().parents[2] / "titanarch"
TP, CP = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
METHOD, BALANCE = "--parallelism.context_parallel_method", "--parallelism.context_parallel_load_balance"
REPLICATE, SHARD = "--parallelism.data_parallel_replicate_degree", "--parallelism.data_parallel_shard_degree"
EXTERNAL = '{kind = "external", module = "tests.parity.external:RunningMean", arguments = {width = "$d_model"}, mix_documents = true}'
LOCAL = [f"--model.mixers.mean={EXTERNAL}", '--model.layers=["attention", "mean"]']

CASES: dict[str, tuple[int, list[str], list[str]]] = {
    "tensor degree and the world": (4, [TP, "3"], ["[parallelism] tensor_parallel_degree", "3 does not divide the 4 processes"]),
    "context degree and the world": (4, [CP, "8"], ["[parallelism] context_parallel_degree", "8 does not divide the 4 processes"]),
    "replicas and the world": (2, [REPLICATE, "4"], ["[parallelism] data_parallel_replicate_degree", "does not divide the 2 processes"]),
    "all degrees and the world": (
        8,
        [TP, "2", CP, "2", SHARD, "4"],
        ["[parallelism] data_parallel_shard_degree", "number of processes, 8"],
    ),
    "rows and data parallelism": (6, [], ["[training] global_batch_size"]),
    "heads of a wanted method": (
        4,
        [CP, "4", METHOD, "heads"],
        ["[parallelism] context_parallel_method", "Attention", "heads: its 2 heads a process are no multiple of 4"],
    ),
    "heads that tensor parallelism has divided": (
        4,
        [CP, "2", TP, "2", METHOD, "heads"],
        ["[parallelism] context_parallel_method", "its 1 heads a process are no multiple of 2"],
    ),
    "a method that is not declared": (
        2,
        [CP, "2", METHOD, "state"],
        ["[parallelism] context_parallel_method", "state: it declares gather"],
    ),
    "heads and tensor parallelism": (4, [TP, "4"], ["[parallelism] tensor_parallel_degree", "Attention", "2 heads are no multiple"]),
    "a pair of maps": (
        2,
        [TP, "2", '--model.layers=["diff_attention"]', "--model.mixers.diff_attention.n_heads=1"],
        ["[parallelism] tensor_parallel_degree", "DiffAttention", "1 heads are no multiple"],
    ),
    "a pair of maps and a wanted method": (
        2,
        [CP, "2", METHOD, "heads", '--model.layers=["diff_attention_v2"]', "--model.mixers.diff_attention_v2.n_heads=1"],
        ["[parallelism] context_parallel_method", "DiffAttentionV2", "heads: its 1 heads a process are no multiple of 2"],
    ),
    "hidden units": (2, [TP, "2", "--model.channel.d_ff", "33"], ["tensor_parallel_degree", "33 hidden units (d_ff) are no multiple"]),
    "a LocalMixer and tensor parallelism": (2, [TP, "2", *LOCAL], ["tensor_parallel_degree", "External", "LocalMixer"]),
    "a LocalMixer and context parallelism": (2, [CP, "2", *LOCAL], ["context_parallel_degree", "External", "LocalMixer"]),
    "asynchronous tensor parallelism on a CPU": (
        2,
        [TP, "2", "--parallelism.enable_async_tensor_parallel", "true"],
        ["[parallelism] enable_async_tensor_parallel", "CUDA", "cpu"],
    ),
    "asynchronous tensor parallelism without any": (
        1,
        ["--parallelism.enable_async_tensor_parallel", "true"],
        ["[parallelism] enable_async_tensor_parallel", "tensor_parallel_degree above 1"],
    ),
    "a length and head-tail parts": (
        2,
        [CP, "2", BALANCE, "head_tail", "--training.seq_len", "34"],
        ["[training] seq_len", "34 tokens", "multiple of 4"],
    ),
    "a length and contiguous parts": (
        2,
        [CP, "2", BALANCE, "contiguous", "--training.seq_len", "33"],
        ["[training] seq_len", "33 tokens", "multiple of 2"],
    ),
    "a length and sequence parallelism": (2, [TP, "2", "--training.seq_len", "33"], ["[training] seq_len", "33 tokens", "multiple of 2"]),
    "a length and both": (
        4,
        [TP, "2", CP, "2", BALANCE, "head_tail", "--training.seq_len", "36"],
        ["[training] seq_len", "multiple of 8 = context_parallel_degree 2"],
    ),
    "pipelines": (
        2,
        ["--parallelism.pipeline_parallel_degree", "2"],
        ["[parallelism] pipeline_parallel_degree", "no pipeline parallelism"],
    ),
    "experts": (
        2,
        ["--parallelism.expert_parallel_degree", "2"],
        ["[parallelism] expert_parallel_degree", "no expert parallelism", "tensor_parallel_degree the hidden units of each; use 1"],
    ),
    "short rows of a document each": (
        1,
        ["--training.phases=[{steps = 4, seq_len = 16, global_batch_size = 8}]", "--data.packing=padded"],
        ["[data] packing", "'padded' fills up what a document leaves", "use best_fit or concat, or give training.phases rows of"],
    ),
    "short rows of groups of a stream": (
        1,
        ["--training.phases=[{steps = 4, seq_len = 16, global_batch_size = 8}]", "--data.mode=streamed", "--data.packing=best_fit"],
        ["[data] packing", "'best_fit' packs a group", "use concat or indexed data, or give training.phases rows of"],
    ),
    "a phase whose rows do not divide": (
        2,
        [CP, "2", "--training.phases=[{steps = 2, seq_len = 1, global_batch_size = 16}]"],
        ["[training] seq_len", "1 tokens are no multiple of"],
    ),
    "a phase whose batch does not divide": (
        4,
        ["--training.phases=[{steps = 4, seq_len = 32, global_batch_size = 6}]"],
        ["[training] global_batch_size", "6 rows a step do not divide"],
    ),
    "more shapes than graphs": (
        1,
        [
            f"--training.phases=[{', '.join(f'{{steps = 1, seq_len = 32, global_batch_size = {n}}}' for n in range(1, 18))}]",
            "--compile.enable=true",
        ],
        ["[training] phases", "17 shapes of micro-batches are more than the 16 that blocks are compiled for"],
    ),
    "a phase of rows that fill no window": (
        1,
        ["--training.phases=[{steps = 1, seq_len = 8, global_batch_size = 6}]"],
        ["phases.0: 6 rows of 8 tokens do not fill whole rows of 32: make its steps times its rows a multiple of 4"],
    ),
    "everything at once": (
        2,
        [
            *(TP, "2", "--model.channel.d_ff", "33", "--training.seq_len", "31"),
            *(*LOCAL, "--parallelism.enable_async_tensor_parallel", "true", "--training.global_batch_size", "7"),
            *("--training.local_batch_size", "2", "--profiling.enable_memory_snapshot", "true"),
        ],
        [
            "MLP cannot be divided among 2 processes",
            "External cannot be divided among 2 processes",
            "[parallelism] enable_async_tensor_parallel",
            "[training] seq_len",
            "[training] global_batch_size",
            "[profiling] enable_memory_snapshot",
        ],
    ),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    return write_config(folder, "run", folder / "cache")


@pytest.mark.parametrize("case", list(CASES))
def test_what_cannot_be_divided_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    world_size, overrides, said = CASES[case]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main(["config", "check", "--config", str(config), *overrides]) == 2
    message = capsys.readouterr().err
    for text in said:
        assert text in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, [TP, "2"]),
        (2, [CP, "2", METHOD, "heads"]),
        (4, [TP, "2", CP, "2"]),
        (8, [TP, "2", CP, "2", REPLICATE, "2"]),
        (2, [TP, "2", "--parallelism.enable_sequence_parallel", "false", "--training.seq_len", "33"]),
        (2, LOCAL),
    ],
)
def test_what_can_be_divided_is_not_refused(config: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, overrides: list[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main(["config", "check", "--config", str(config), *overrides]) == 0


def test_training_refuses_before_it_writes_anything(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(config), TP, "2"]) == 2
    assert "does not divide the 1 processes" in capsys.readouterr().err
    assert not (config.parent / "run").exists()


def heads_first() -> list[str]:
    """What is decided for a mixer that prefers HEADS; registered in a process of its own."""
    from tests.parallel.heads_first import HeadsFirst  # noqa: F401 (registers it)

    decided = []
    for n_heads in (4, 3):
        table = {"n_layers": 2, "d_model": 24, "n_heads": n_heads, "layers": ["heads_first"], "channel": "swiglu"}
        with torch.device("meta"):
            model = Decoder(DecoderConfig.model_validate(table), 40, 16)
        parallelism = ParallelismConfig(context_parallel_degree=2)
        division = decide_division(model, parallelism, resolve_degrees(parallelism, 2), seq_len=16, device_type="cpu")
        decided += [*(method.value for method in division.methods if method), str(division.head_tail), *division.notes]
    return decided


def test_auto_takes_the_next_declared_method_and_says_so() -> None:
    note = "HeadsFirst: context parallelism by gather, as heads: its 3 heads a process are no multiple of 2"
    assert run_distributed(heads_first, 1)[0] == ["heads", "heads", "False", "gather", "gather", "True", note]


def test_rows_without_two_equal_parts_a_process_are_divided_contiguously() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.model_validate({"n_layers": 1, "d_model": 16, "n_heads": 4, "channel": "mlp"}), 40, 18)
    division = decide_division(model, ParallelismConfig(context_parallel_degree=2), Degrees(1, 1, cp=2), seq_len=18, device_type="cpu")
    assert not division.head_tail
    assert division.notes == ("rows are divided contiguously: 18 tokens do not make two equal parts for each process",)


FORBIDDEN = {"mesh", "device_mesh", "DeviceMesh", "ProcessGroup", "process_group", "get_rank", "get_world_size", "get_group", "world_size"}
ALLOWED = {
    ("contract/init.py", "device_mesh"),
    ("contract/layers.py", "torch.distributed.tensor"),
    ("contract/init.py", "torch.distributed.tensor"),
}
"""Parameters may be DTensors: weights are cut to what a process holds, and read where they lie."""


def names_of_processes(source: str, file: str) -> Iterator[str]:
    """What a file names of meshes, groups and torch.distributed."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Name):
            found = [node.id]
        elif isinstance(node, ast.Attribute):
            found = [node.attr, "torch.distributed"] if node.attr == "distributed" else [node.attr]
        elif isinstance(node, ast.arg):
            found = [node.arg]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or "", *(alias.name for alias in node.names)]
        for name in found:
            if (name in FORBIDDEN or name.startswith("torch.distributed")) and (file, name) not in ALLOWED:
                yield f"{file}:{node.lineno}: {name}" if isinstance(node, ast.expr | ast.stmt | ast.arg) else name


def test_no_model_names_a_mesh_or_a_process_group() -> None:
    files = [file for folder in ("models", "contract") for file in sorted((PACKAGE / folder).rglob("*.py"))]
    assert len(files) > 40
    assert [name for file in files for name in names_of_processes(file.read_text("utf-8"), str(file.relative_to(PACKAGE)))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch.distributed import ProcessGroup",
        "from torch.distributed.tensor import DTensor",
        "n = torch.distributed.get_world_size()",
        "def f(mesh): ...",
        "rank = group.get_rank()",
    ],
)
def test_a_mesh_in_a_model_is_found(source: str) -> None:
    assert list(names_of_processes(source, "models/x.py")) != []


REGISTRIES: tuple[Registry[object], ...] = (MIXERS, CHANNELS, NORMS, ABSOLUTE_POSITIONS, RELATIVE_POSITIONS)  # type: ignore[assignment]


def test_adding_a_component_needs_no_edit_in_parallel() -> None:
    """parallel/ names no component: neither its class nor what a configuration calls it.

    That a mixer registered elsewhere runs under every technique is ``tests/parity``.
    """
    registered = {name for registry in REGISTRIES for name in registry} - {"none"}
    classes = {registry[name].__name__ for registry in REGISTRIES for name in registry}  # type: ignore[attr-defined]
    assert {"attention", "alibi", "swiglu", "Attention", "ALiBi"} & (registered | classes) >= {"attention", "alibi", "swiglu", "Attention"}
    for file in sorted((PACKAGE / "parallel").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            named = node.value if isinstance(node, ast.Constant) else node.id if isinstance(node, ast.Name) else None
            assert named not in registered | classes, f"{file.name}:{node.lineno} names the component {named}"  # type: ignore[attr-defined]


def test_the_external_fixture_declares_nothing() -> None:
    """Or the cases above would refuse something else than a LocalMixer."""
    assert not isinstance(RunningMean(4), SequenceMixer)
