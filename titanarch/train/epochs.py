"""How many epochs a run takes: said before its first step, refused where they are too many, and how many it took."""

from titanarch.data.repeats import check_repeats
from titanarch.data.row_loader import RowLoader
from titanarch.train.budget import Budget


def planned_epochs(loader: RowLoader, budget: Budget, *, allowed: bool) -> str:
    """The epochs of the whole run, in words. ConfigError where they are too many and not ``allowed``."""
    steps = budget.total_steps
    if steps is None:
        return "epochs planned: as many as the minutes allow"
    passes = loader.passes(loader.phases.rows_before(steps))
    check_repeats(passes, allowed=allowed)
    return f"epochs planned: {', '.join(map(str, passes)) or 'unknown, since streamed text is not counted beforehand'}"


def check_next_step(loader: RowLoader, budget: Budget, *, allowed: bool) -> None:
    """ConfigError where the next step of a run by minutes takes rows too often and that is not ``allowed``."""
    if budget.total_steps is None and not allowed:
        check_repeats(loader.passes(loader.next_row + loader.layout.global_batch_size), allowed=False)


def epochs_done(loader: RowLoader) -> float:
    """Passes over the data that are behind; of a mixture and of streams whole ones, those of the source that has had the fewest."""
    passes = loader.passes(loader.next_row)
    return passes[0].epochs if len(passes) == 1 else float(loader.epoch)


def data_counts(loader: RowLoader) -> dict[str, int | float]:
    """The metrics of the data so far: passes, over each source of a mixture too, and what was skipped where something was."""
    passes = {"epoch": loader.epoch, **{f"epoch/{name}": passes for name, passes in loader.source_epochs.items()}}
    skipped = loader.skipped
    return {**passes, **({"skipped_documents": skipped.documents, "skipped_files": skipped.files} if any(skipped) else {})}
