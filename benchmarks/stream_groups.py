"""How soon rows of streams that are packed by best fit go on, in the middle of groups of their full size.

    python -m benchmarks.stream_groups                     # about a minute

Text is the package's corpus in pieces of 4,096 characters, each several times, so that a pass is longer than a group. 32 streams are
read to the middle of their first groups of 512 rows of 2,048 tokens; then a new loader is made, given that state, and asked for a batch.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.loader import PIECE_CHARACTERS, ROWS, SEQ_LEN, loader_of, write_pieces
from benchmarks.measure import call, record
from titanarch.data.config import DataConfig
from titanarch.data.stream_groups import FIRST_ROWS, MOST_ROWS
from titanarch.data.tokenizers import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=40, help="of each piece of text")
    parser.add_argument("--rounds", type=int, default=5, help="times that the streams go on")
    parser.add_argument("--record", default="stream_groups", help="name in benchmarks/results; empty: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="groups-") as name:
        path = write_pieces(Path(name) / "pieces.jsonl", PIECE_CHARACTERS)
        path.write_bytes(path.read_bytes() * options.copies)
        source = {"kind": "jsonl", "paths": [str(path)]}
        config = DataConfig.model_validate({"source": source, "mode": "streamed", "packing": "best_fit", "allow_repeat": True})
        tokenizer = build_tokenizer(config.tokenizer)
        loader = loader_of(config, tokenizer)
        for _ in range(MOST_ROWS - FIRST_ROWS + MOST_ROWS // 2 + 2 * FIRST_ROWS):  # the smaller groups together, and half of one
            next(loader)
        state = loader.state_dict()
        sizes = [(cursor["group_rows"], cursor["skip"], len(cursor["lengths"])) for cursor in state["cursors"].values()]

        def resume() -> None:
            other = loader_of(config, tokenizer)
            other.load_state_dict(state)
            assert int(next(other).row_B[0]) == state["phases"][0][1], "goes on elsewhere"

        samples = [call(resume).wall_seconds for _ in range(options.rounds)]
    n_rows = sum(rows for rows, _, _ in sizes)
    middle, most = sorted(samples)[len(samples) // 2], max(samples)
    print(f"{len(sizes)} streams in groups of {n_rows / len(sizes):.0f} rows: on after {middle:.2f} s, {most:.2f} at most")
    results = [{"measured": "seconds to go on", "groups": sizes, "wall_seconds": samples}]
    if options.record:
        print(record(options.record, results, settings={**vars(options), "seq_len": SEQ_LEN, "rows": ROWS}))


if __name__ == "__main__":
    main()
