"""Run loop of a pack: resume from checkpoints, train to completion, isolate failures to the cell that caused them.

After every update, in this order: metrics, evaluation if due, result if it was the last update, heartbeat, checkpoint
if due. On resume, metrics and evaluations are truncated to the checkpoint, so that every update is recorded exactly
once however often the process was killed. `result.json` is written last.

A cell that fails leaves its pack: its error is recorded, and the others continue with unchanged bits. Where an error
cannot be attributed to one cell (out of memory, say), the pack is split and every cell continues alone, so that only
the one that caused the error fails.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from klab.grid.errors import UserError
from klab.grid.kl_settings import reference_notes
from klab.harness.policy.preferences import starting_point
from klab.harness.store import CellFolder, ClaimRevoked, Run
from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import CellState
from klab.harness.training.data.notes import divergence_notes, precision_notes, sampling_notes, small_set_notes
from klab.harness.training.data.overlong import check_overlong_buffer
from klab.harness.training.data.prompts import PromptLengths
from klab.harness.training.data.samplers import check_sampler
from klab.harness.training.distributed import sharded_checkpoint
from klab.harness.training.distributed.commands import CommandChannel
from klab.harness.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from klab.harness.training.distributed.worker import start_pack
from klab.harness.training.finalize import finalize_cell
from klab.harness.training.metrics import Row
from klab.harness.training.pack import Pack, device
from klab.harness.training.packed_cell import CellFailure, PackedCell
from klab.harness.training.runtime.checkpoint_clock import CheckpointClock
from klab.harness.training.runtime.oom import explain_oom, free_memory, is_out_of_memory
from klab.harness.training.runtime.pack_invariance import pack_invariant
from klab.harness.training.runtime.torch_settings import configure_torch
from klab.harness.training.stop_rule import why_hopeless

HEARTBEAT_SECONDS = 2.0
"""Least time between two heartbeats of a cell."""


_Ready = tuple[PackedCell, CellState | None]
"""A cell that is about to run, and where it goes on from."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress report of one cell, given after every update, and once before the first with no reward yet."""

    cell: str
    update: int
    updates: int
    reward: float | None


def run_cells(
    run_path: str | Path,
    cell_ids: Sequence[str],
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    threads: int = 1,
    process_group: ProcessGroup | None = None,
) -> dict[str, str]:
    """Train cells of a run folder from where they are, in packs of equal shape and progress.

    Where a pack would change its cells' bits on this processor (`pack_invariance`), they run one after another.

    Args:
        run_path: the run folder.
        cell_ids: cells to run; those with a result are left alone.
        progress: called after every update of every cell.
        stop: asked at every update boundary; once it is true, every cell is checkpointed and the call returns.
        threads: torch threads of this process.
        process_group: the processes that train together, of which this one leads; None: this one alone.

    Returns:
        Each cell's state: `finished`, `diverged`, `stopped` (by `training.stop`), `failed` (error.txt says why),
        `interrupted` (a checkpoint is there), or `cancelled` (this process no longer owns the cell and left it as it
        was).
    """
    run = Run.open(Path(run_path))
    channel = CommandChannel(process_group or SINGLE_PROCESS)
    runner = PackRunner(run, progress or (lambda _: None), stop or (lambda: False), channel)
    with configure_torch(threads), _shutting_down(channel):
        folders = {folder.id: folder for folder in map(run.cell, cell_ids)}
        lengths = PromptLengths()
        waiting: dict[tuple[str, int], list[_Ready]] = {}
        for identity, folder in folders.items():
            with runner.isolate_failure(identity):
                result = folder.result()
                if result is not None:
                    runner.states[identity] = str(result["state"])
                    continue
                folder.clear_failure()
                try:
                    member, state = prepare_cell(run, folder, runner.report_warmup, lengths)
                except _StopRequested:
                    runner.states[identity] = "interrupted"
                    continue
                training = member.cell.training
                held_out, train = len(member.split("held_out")), len(member.split("train"))
                precision = precision_notes(member.cell.policy, device().type != "cpu")
                known = (*sampling_notes(training), *divergence_notes(member.cell.objective), *precision)
                for note in (*small_set_notes(training, train, held_out), *known, *reference_notes(training)):
                    runner.print_once(note)
                waiting.setdefault((member.shape(), state.update if state else 0), []).append((member, state))
        for alike in waiting.values():
            for together in _together(alike):
                runner.start([member for member, _ in together], [state for _, state in together if state is not None])
    return {identity: runner.states[identity] for identity in folders}


def _together(alike: list[_Ready]) -> list[list[_Ready]]:
    """What is trained as one pack: all, or each alone where a pack on this processor would change their bits."""
    if len(alike) == 1 or device().type != "cpu" or pack_invariant():
        return [alike]
    print(f"klab: {len(alike)} cells train one after another: a pack would change their bits here", file=sys.stderr)
    return [[one] for one in alike]


@contextmanager
def _shutting_down(channel: CommandChannel) -> Iterator[None]:
    try:
        yield
    finally:
        channel.shutdown()


class _StopRequested(Exception):
    """A stop was requested while the initial policy was being trained; nothing of it is kept."""


def prepare_cell(
    run: Run,
    folder: CellFolder,
    watch: Callable[[int, int, float], None] | None = None,
    lengths: PromptLengths | None = None,
) -> tuple[PackedCell, CellState | None]:
    """Load a cell's task, make its initial policy unless the run has it, and read its checkpoint if there is one."""
    cell = folder.cell()
    task, start = starting_point(cell.task, cell.policy, cell.seed, run.policies, watch)
    member = PackedCell(cell, task, start, run.created, lengths or PromptLengths())
    check_overlong_buffer(member)
    check_sampler(member)
    return member, checkpoint.resume(folder, device())


class PackRunner:
    """Trains packs, and keeps the state of every cell of one call of `run_cells`."""

    def __init__(
        self, run: Run, progress: Callable[[Progress], None], stop: Callable[[], bool], channel: CommandChannel
    ) -> None:
        self.states: dict[str, str] = {}
        self._channel = channel
        self._run = run
        self._progress = progress
        self._stop = stop
        self._last_heartbeat = -HEARTBEAT_SECONDS
        self._rewards: dict[str, float | None] = {}
        self._printed: set[str] = set()

    def print_once(self, note: str) -> None:
        """A line in the job's output, however many cells it is true of."""
        if note not in self._printed:
            self._printed.add(note)
            print(note, file=sys.stderr, flush=True)

    def report_warmup(self, update: int, at_most: int, accuracy: float) -> None:
        """Progress of an initial policy's warm-up: print a line, and stop if that was requested."""
        if not sys.stderr.isatty():
            print(f"starting policy: {update} updates, held-out accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
        if self._stop():
            raise _StopRequested

    def start(self, members: Sequence[PackedCell], states: Sequence[CellState]) -> None:
        """Stack the members, resumed from their states if there are any, and train them to their end."""
        try:
            pack = start_pack(self._channel, members, states)
        except Exception as error:
            if len(members) == 1:
                self._fail(members[0].id, explain_oom(error, members[0].cell))
                return
            for position in range(len(members)):
                self.start(members[position : position + 1], states[position : position + 1])
            return
        if pack.budget != pack.settings.budget:
            self.print_once(f"klab: training.token_budget: {pack.budget.tokens}, from the memory of the GPU")
        for member in members:
            self._report_progress(member, pack.done)
        self.run(pack)

    def run(self, pack: Pack) -> None:
        """Train until no member is left."""
        saved_update, clock = pack.done, CheckpointClock(pack.settings.checkpoint_seconds)
        while pack.members:
            if pack.evaluation_due:
                pack, rows = self._compute(pack, Pack.evaluate)
                pack = self._record(pack, rows, CellFolder.append_evaluations)
            if pack.finished:
                self._finish(pack, range(len(pack.members)))
                return
            pack = self._drop_hopeless(self._drop_diverged(pack))
            self._heartbeat(pack)
            if self._stop():
                if pack.done > saved_update:
                    pack = self._save(pack)
                self.states.update({member.id: "interrupted" for member in pack.members})
                return
            due = pack.done % pack.settings.checkpoint_updates == 0
            if pack.done > saved_update and (due or clock.due):
                with clock.saving() as durable:
                    pack = self._save(pack, durable)
                saved_update = pack.done
            pack, rows = self._compute(pack, Pack.advance)
            pack = self._record(pack, rows, CellFolder.append_metrics)
            for member in pack.members:
                self._report_progress(member, pack.done)

    def _compute(self, pack: Pack, work: Callable[[Pack], list[Row]]) -> tuple[Pack, list[Row]]:
        """Run `work`, without the cells that fail; the remaining pack and what `work` returned for it.

        `work` leaves the pack unchanged when it raises, so it is repeated: without the cell that failed, or, where a
        cell alone ran out of memory, once more with half the micro-batch.
        """
        while pack.members:
            try:
                return pack, work(pack)
            except Exception as error:
                smaller = len(pack.members) == 1 and is_out_of_memory(error) and pack.halve_budget()
                if not smaller:
                    pack = self._pack_after(pack, error)
            if smaller:  # outside of the except block, whose traceback would keep the tensors of the failed attempt
                print(f"out of memory; {pack.members[0].id} goes on with micro-batches of {pack.budget.rows} rows")
                pack.policy.release_memory()
                free_memory()
        return pack, []

    def _pack_after(self, pack: Pack, error: Exception) -> Pack:
        """Record an error against the cell that caused it; the pack that continues."""
        if isinstance(error, CellFailure) and not (len(pack.members) > 1 and is_out_of_memory(error.__cause__)):
            self._fail(pack.members[error.position].id, error)
            return pack.select([c for c in range(len(pack.members)) if c != error.position])
        if len(pack.members) == 1:
            self._fail(pack.members[0].id, explain_oom(error, pack.members[0].cell, pack.budget.rows))
        else:
            for c in range(len(pack.members)):
                self.run(pack.select([c]))
        return pack.select([])

    def _for_each(self, pack: Pack, action: Callable[[CellFolder, int], None]) -> Pack:
        """Apply `action` to every member's folder; the pack of the members for which it succeeded."""
        good = []
        for c, member in enumerate(pack.members):
            with self.isolate_failure(member.id):
                action(self._run.cell(member.id), c)
                good.append(c)
        return pack if len(good) == len(pack.members) else pack.select(good)

    def _record(self, pack: Pack, rows: list[Row], append: Callable[[CellFolder, list[Row]], None]) -> Pack:
        for member, row in zip(pack.members, rows, strict=True):
            self._rewards[member.id] = row.get("reward_mean", self._rewards.get(member.id))
        return self._for_each(pack, lambda folder, c: append(folder, [rows[c]]))

    def _save(self, pack: Pack, durable: bool = True) -> Pack:
        def save(folder: CellFolder, c: int) -> None:
            folder.assert_owner()
            if durable:
                folder.sync()
            pack.write_shards(folder.checkpoint)
            checkpoint.write(folder.checkpoint, pack.state(c), durable=durable)
            sharded_checkpoint.remove_others(folder.checkpoint, pack.done)

        return self._for_each(pack, save)

    def _drop_diverged(self, pack: Pack) -> Pack:
        lost = pack.diverged()
        if not lost:
            return pack
        self._finish(pack, lost, diverged=True)
        return pack.select([c for c in range(len(pack.members)) if c not in lost])

    def _drop_hopeless(self, pack: Pack) -> Pack:
        """End the members whose rule says so after the evaluation that was just made."""
        if pack.evaluated != pack.done:
            return pack
        left = []
        for c, member in enumerate(pack.members):
            rule = member.cell.training.stop
            if rule is None:
                left.append(c)
                continue
            with self.isolate_failure(member.id):
                reason = why_hopeless(rule, self._run.cell(member.id).evaluations())
                if reason is None:
                    left.append(c)
                else:
                    self._finish(pack, [c], hopeless=reason)
        return pack if len(left) == len(pack.members) else pack.select(left)

    def _finish(
        self, pack: Pack, positions: Sequence[int], diverged: bool = False, hopeless: str | None = None
    ) -> None:
        for position in positions:
            with self.isolate_failure(pack.members[position].id):
                folder = self._run.cell(pack.members[position].id)
                processes = self._channel.process_group.size
                self.states[folder.id] = finalize_cell(
                    folder,
                    pack,
                    position,
                    processes,
                    diverged,
                    hopeless,
                    self._run.evaluations,
                    self._stop,
                )

    def _heartbeat(self, pack: Pack) -> None:
        """Write the heartbeat of every member, at most every `HEARTBEAT_SECONDS`."""
        if time.monotonic() - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = time.monotonic()
        for member in pack.members:
            reward, updates = self._rewards.get(member.id), member.cell.training.updates
            with suppress(OSError, ClaimRevoked):  # the next row of metrics will tell whether this matters
                self._run.cell(member.id).write_heartbeat({"update": pack.done, "updates": updates, "reward": reward})

    def _report_progress(self, member: PackedCell, update: int) -> None:
        self._progress(Progress(member.id, update, member.cell.training.updates, self._rewards.get(member.id)))

    @contextmanager
    def isolate_failure(self, identity: str) -> Iterator[None]:
        """Context in which an exception fails this cell and no other."""
        try:
            yield
        except Exception as error:
            self._fail(identity, error)

    def _fail(self, identity: str, error: Exception) -> None:
        if isinstance(error, ClaimRevoked):
            self.states[identity] = "cancelled"
            return
        self.states[identity] = "failed"
        text = f"{error}\n" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        print(text, end="", file=sys.stderr)
        with suppress(OSError):  # a full disk: the job's log has the text
            self._run.cell(identity).record_failure(text)
