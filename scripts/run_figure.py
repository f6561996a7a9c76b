"""Draws what runs did: training loss against tokens, and perplexity against context length.

python scripts/run_figure.py --out docs/images/small.png outputs/small_alibi outputs/small_rotary
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RULE = "same_targets"
"""Every length is scored on the same targets, so the lengths of a run compare."""


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a run's metrics.jsonl, and its result.json."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return rows, result


def draw(folders: list[Path], out: Path) -> None:
    """Both panels for all runs, and the baselines of the first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for number, folder in enumerate(folders):
        rows, result = read_run(folder)
        color = f"C{number}"
        trained = [row for row in rows if "loss" in row]
        validated = [row for row in rows if "validation_loss" in row]
        left.plot([r["tokens"] / 1e6 for r in trained], [r["loss"] for r in trained], color=color, alpha=0.35, linewidth=1)
        left.plot(
            [r["tokens"] / 1e6 for r in validated],
            [r["validation_loss"] for r in validated],
            color=color,
            marker="o",
            markersize=3,
            label=folder.name,
        )
        table = [row for row in result["evaluation"] if row["rule"] == RULE and "perplexity" in row]
        right.plot([r["length"] for r in table], [r["perplexity"] for r in table], color=color, marker="o", label=folder.name)
        if number == 0:
            for name in ("unigram", "bigram"):
                loss = table[0][f"{name}_loss"]
                left.axhline(loss, color="gray", linestyle=":", linewidth=1)
                left.annotate(name, (0, loss), color="gray", fontsize=8, va="bottom")
    left.set(xlabel="tokens trained on, millions", ylabel="loss, nats a token", title="training (pale) and validation")
    right.set(xlabel="context length, tokens", ylabel="validation perplexity", title="by context length, on the same targets", xscale="log")
    right.set_ylim(bottom=0)
    lengths = sorted({row["length"] for row in result["evaluation"]})
    right.set_xticks(lengths, [str(length) for length in lengths])
    right.minorticks_off()
    left.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", required=True, type=Path, help="the PNG file")
    args = parser.parse_args()
    draw(args.runs, args.out)


if __name__ == "__main__":
    main()
