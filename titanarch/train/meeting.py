"""How the processes of one start agree on a name for it, at a store that may remember earlier starts.

torchrun keeps its store when it starts processes again (torch 2.13), with the addresses of dead processes in it; and its
count of restarts can differ between nodes. So what a start writes stands under a name that only this start has.
"""

import json
import time
import uuid

from torch._C._distributed_c10d import Store

PREFIX = "titanarch/meeting"
MOST_SECONDS_BETWEEN_LOOKS = 0.5


def agree(store: Store, rank: int, world_size: int, *, seconds: float) -> str:
    """The name of this start, alike on its ``world_size`` processes and on no other's. All of them call this.

    Each leaves a number drawn for the occasion. Process 0 shows the list of all that lie there; whoever finds its own
    in the list knows that it was written by the process 0 of this start, whose number is the name, and says so.
    Process 0 shows the list again, because numbers of an earlier start may lie there, until all others have said so.
    Raises TimeoutError after ``seconds``.
    """
    own, started, pause = uuid.uuid4().hex, time.monotonic(), 0.01
    places = [f"{PREFIX}/{each}" for each in range(world_size)]
    store.set(places[rank], own)
    while True:
        if rank == 0 and store.check(places):
            store.set(f"{PREFIX}/list", json.dumps([number.decode() for number in store.multi_get(places)]))
        if rank == 0 and store.add(f"{PREFIX}/found/{own}", 0) == world_size - 1:
            return own
        if rank > 0 and store.check([f"{PREFIX}/list"]):
            numbers: list[str] = json.loads(store.get(f"{PREFIX}/list"))
            if len(numbers) == world_size and numbers[rank] == own:
                store.add(f"{PREFIX}/found/{numbers[0]}", 1)
                return numbers[0]
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"process {rank} of {world_size} waited {seconds:.0f} s for the others to start; their output says why")
        time.sleep(pause)
        pause = min(2 * pause, MOST_SECONDS_BETWEEN_LOOKS)
