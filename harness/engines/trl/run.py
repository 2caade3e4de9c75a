"""Train the cells of a run whose engine is TRL, one after another, and isolate a failure to the cell that caused it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from klab.grid.errors import UserError
from klab.harness.engines.trl.launcher import Ranks
from klab.harness.engines.trl.together import train_on_ranks
from klab.harness.store import CellFolder, ClaimRevoked, Run
from klab.harness.training.runner import Progress
from klab.harness.training.runtime.oom import explain_oom, free_memory, is_out_of_memory
from klab.harness.training.runtime.torch_settings import configure_torch


def train_cells(
    run_path: str | Path,
    cell_ids: Sequence[str],
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    threads: int = 1,
    ranks: Ranks | None = None,
) -> dict[str, str]:
    """Train cells from where they are, one after another; as `klab.harness.training.run_cells`, without packs.

    Args:
        ranks: the processes that train each cell together; None: this one alone.

    Returns:
        Each cell's state: `finished`, `diverged`, `stopped`, `failed`, `interrupted`, or `cancelled`.
    """
    run = Run.open(run_path)
    told, asked = progress or (lambda _: None), stop or (lambda: False)
    states = {}
    with configure_torch(threads) if ranks is None else nullcontext():
        for folder in map(run.cell, cell_ids):
            result = folder.result()
            if result is not None:
                states[folder.id] = str(result["state"])
            elif asked():
                states[folder.id] = "interrupted"
            elif ranks is None:
                states[folder.id] = attempt(folder, partial(_train_here, run, folder, told, asked))
            else:
                states[folder.id] = attempt(folder, partial(train_on_ranks, run, folder, ranks, threads, told, asked))
    return states


def _train_here(
    run: Run, folder: CellFolder, progress: Callable[[Progress], None], stop: Callable[[], bool], halved: bool
) -> str:
    from klab.harness.engines.trl.settings import require_trl

    require_trl()
    from klab.harness.engines.trl.cell import train

    return train(run, folder, progress=progress, stop=stop, halved=halved)


def attempt(folder: CellFolder, work: Callable[[bool], str]) -> str:
    """A cell's state after `work`, which is done once more with half of the micro-batch where memory ran out.

    An exception fails the cell; where the claim was revoked it is left as it is.
    """
    folder.clear_failure()
    try:
        try:
            return work(False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"out of memory; {folder.id} goes on from its checkpoint with half the micro-batch", file=sys.stderr)
        free_memory()
        return work(True)
    except ClaimRevoked:
        return "cancelled"
    except Exception as error:
        record_failure(folder, error)
        return "failed"


def record_failure(folder: CellFolder, error: Exception) -> None:
    """Write down why a cell failed."""
    explained = explain_oom(error, folder.cell())
    plain = isinstance(explained, UserError)
    text = f"{explained}\n" if plain else "".join(traceback.format_exception(explained))
    print(text, end="", file=sys.stderr)
    with suppress(OSError):  # a full disk: the job's log has the text
        folder.record_failure(text)
