import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PARENTS = {
    "stream workers": """
from tests.data.common import data_config, loader_of, make_texts, write_jsonl
path = write_jsonl(folder / "a.jsonl", make_texts(20))
config = data_config(folder / "cache", source={"kind": "jsonl", "paths": [str(path)]}, mode="streamed", workers=2)
loader = loader_of(config, rows=4, local=4, rank=0, degree=1)
next(loader)
""",
    "tokenizing processes": """
import concurrent.futures, multiprocessing
from titanarch.data.prepare import _start_worker, _tokenize_in_worker
from titanarch.data.tokenizers import BytesConfig, BytesTokenizer
context = multiprocessing.get_context("spawn")
tokenizer = BytesTokenizer(BytesConfig())
pool = concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=_start_worker, initargs=(tokenizer,))
list(pool.map(_tokenize_in_worker, [["a"]] * 4))
""",
}
FRAME = """
import multiprocessing, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
{}
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", list(PARENTS))
def test_children_of_a_killed_process_end(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text("if __name__ == '__main__':\n" + "\n".join("    " + line for line in FRAME.format(PARENTS[kind]).splitlines()))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    try:
        assert len(children) == 2
        assert all(map(runs, children))
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not any(map(runs, children)), 10)
    finally:
        parent.kill()
        for child in filter(runs, children):
            os.kill(child, signal.SIGKILL)
