"""One life of a pack: from the checkpoints it finds to results, an interruption, or failures, cell by cell.

At the boundary after every update, in this order: metrics, evaluation if due, result if that was the last,
heartbeat, checkpoint if due. A life begins by cutting metrics and evaluations back to the checkpoint, so every
update is recorded exactly once however often the process was killed. `result.json` comes last of all.

A cell that cannot go on leaves its pack: its error is recorded and the others carry on with unchanged bits. If an
error cannot be blamed on one cell (memory, say), the pack is taken apart and each cell carries on alone, so that
only the guilty one fails.
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
from klab.harness.policy.init.initial_policy import initial_policy
from klab.harness.store import CellFolder, Evicted, Run
from klab.harness.training import checkpoint
from klab.harness.training.checkpoint import State
from klab.harness.training.data.overlong import check_buffer
from klab.harness.training.data.sampler_mismatch import check_sampler
from klab.harness.training.distributed.commands import Orders
from klab.harness.training.distributed.process_group import ALONE, World
from klab.harness.training.distributed.worker import begin
from klab.harness.training.finalize import conclude
from klab.harness.training.metrics import Row
from klab.harness.training.pack import Pack, device
from klab.harness.training.packed_cell import CellFailure, Member
from klab.harness.training.runtime.oom import explained, out_of_memory, release
from klab.harness.training.runtime.torch_settings import settled
from klab.tasks import load_task

BEAT_SECONDS = 2.0
"""Signs of life are at least this far apart; evaluations and ends always give one."""

DURABLE_SECONDS = 5.0
"""Waiting for the disk, so that a checkpoint survives a power cut, is done this often at most; every checkpoint
survives the death of the process, and one that a power cut tore is noticed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a watcher is told after every update (and once before the first, with no reward yet)."""

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
    world: World | None = None,
) -> dict[str, str]:
    """Run cells of a run folder from where they are, in packs of equal shape and progress.

    Args:
        run_path: the run folder.
        cell_ids: cells to run; those with a result are left alone.
        progress: called after every update of every cell.
        stop: asked at every update boundary; once it is true, every cell is checkpointed and the call returns.
        threads: torch threads of this process.
        world: the processes that train together, of which this one leads; None: this one alone.

    Returns:
        Each cell's state: `finished`, `diverged`, `failed` (error.txt says why), `interrupted` (a checkpoint is
        there), or `cancelled` (the cell was taken away from this process, which left it as it was).
    """
    run = Run.open(Path(run_path))
    orders = Orders(world or ALONE)
    life = _Life(run, progress or (lambda _: None), stop or (lambda: False), orders)
    with settled(threads), _dismissing(orders):
        folders = {folder.id: folder for folder in map(run.cell, cell_ids)}
        waiting: dict[tuple[str, int], list[tuple[Member, State | None]]] = {}
        for identity, folder in folders.items():
            with life.blaming(identity):
                result = folder.result()
                if result is not None:
                    life.states[identity] = str(result["state"])
                    continue
                folder.forgive()
                try:
                    member, state = _prepared(run, folder, life.warming_up)
                except _Halted:
                    life.states[identity] = "interrupted"
                    continue
                waiting.setdefault((member.shape(), state.update if state else 0), []).append((member, state))
        for alike in waiting.values():
            life.begin([member for member, _ in alike], [state for _, state in alike if state is not None])
    return {identity: life.states[identity] for identity in folders}


@contextmanager
def _dismissing(orders: Orders) -> Iterator[None]:
    try:
        yield
    finally:
        orders.dismiss()


class _Halted(Exception):
    """Asked to stop while the starting policy was being made; nothing of it is kept."""


def _prepared(
    run: Run, folder: CellFolder, watch: Callable[[int, int, float], None] | None = None
) -> tuple[Member, State | None]:
    cell = folder.cell()
    task = load_task(cell.task)
    start = initial_policy(cell.policy, task, cell.task, cache=run.policies, progress=watch)
    member = Member(cell, task, start)
    check_buffer(member)
    check_sampler(member)
    return member, checkpoint.resume(folder, device())


class _Life:
    """The states of the cells of one call, and how each of them got there."""

    def __init__(
        self, run: Run, progress: Callable[[Progress], None], stop: Callable[[], bool], orders: Orders
    ) -> None:
        self.states: dict[str, str] = {}
        self._orders = orders
        self._run = run
        self._progress = progress
        self._stop = stop
        self._beaten = -BEAT_SECONDS
        self._rewards: dict[str, float | None] = {}

    def warming_up(self, update: int, at_most: int, accuracy: float) -> None:
        """Follow the making of a starting policy: a line in the job's output, and a chance to stop."""
        if not sys.stderr.isatty():
            print(f"starting policy: {update} updates, held-out accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
        if self._stop():
            raise _Halted

    def begin(self, members: Sequence[Member], states: Sequence[State]) -> None:
        """Stack the members and live; states are all or none."""
        try:
            pack = begin(self._orders, members, states)
        except Exception as error:
            if len(members) == 1:
                self._fail(members[0].id, explained(error, members[0].cell))
                return
            for position in range(len(members)):
                self.begin(members[position : position + 1], states[position : position + 1])
            return
        for member in members:
            self._tell(member, pack.done)
        self.live(pack)

    def live(self, pack: Pack) -> None:
        """From one update boundary to the next until no member is left."""
        saved_update, saved_at, durable_at = pack.done, time.monotonic(), time.monotonic()
        while pack.members:
            training = pack.members[0].cell.training
            if pack.evaluation_due:
                pack, rows = self._compute(pack, Pack.evaluate)
                pack = self._record(pack, rows, CellFolder.append_evaluations)
            if pack.over:
                self._finish(pack, range(len(pack.members)))
                return
            pack = self._without_diverged(pack)
            self._beat(pack)
            if self._stop():
                if pack.done > saved_update:
                    pack = self._save(pack)
                self.states.update({member.id: "interrupted" for member in pack.members})
                return
            due = pack.done % training.checkpoint_updates == 0
            now = time.monotonic()
            if pack.done > saved_update and (due or now - saved_at >= training.checkpoint_seconds):
                durable = now - durable_at >= DURABLE_SECONDS
                pack = self._save(pack, durable)
                saved_update, saved_at, durable_at = pack.done, now, now if durable else durable_at
            pack, rows = self._compute(pack, Pack.advance)
            pack = self._record(pack, rows, CellFolder.append_metrics)
            for member in pack.members:
                self._tell(member, pack.done)

    def _compute(self, pack: Pack, work: Callable[[Pack], list[Row]]) -> tuple[Pack, list[Row]]:
        """What `work` returns for the members that get through it, and the pack of those.

        `work` leaves the pack as it was when it raises, so it is simply done again: without the guilty cell, or, where
        memory did not suffice for a cell alone, once more with half the micro-batch.
        """
        while pack.members:
            try:
                return pack, work(pack)
            except Exception as error:
                smaller = len(pack.members) == 1 and out_of_memory(error) and pack.halve()
                if not smaller:
                    pack = self._after(pack, error)
            if smaller:  # here nothing holds the failed attempt's tensors any more
                print(f"out of memory; {pack.members[0].id} goes on with micro-batches of {pack.limit.rows} rows")
                release()
        return pack, []

    def _after(self, pack: Pack, error: Exception) -> Pack:
        """The pack with which to go on after an error, the blame put where it belongs."""
        if isinstance(error, CellFailure) and not (len(pack.members) > 1 and out_of_memory(error.__cause__)):
            self._fail(pack.members[error.position].id, error)
            return pack.only([c for c in range(len(pack.members)) if c != error.position])
        if len(pack.members) == 1:
            self._fail(pack.members[0].id, explained(error, pack.members[0].cell, pack.limit.rows))
        else:
            for c in range(len(pack.members)):
                self.live(pack.only([c]))
        return pack.only([])

    def _each(self, pack: Pack, action: Callable[[CellFolder, int], None]) -> Pack:
        """Do something to every member's folder; the pack of those for which it worked."""
        good = []
        for c, member in enumerate(pack.members):
            with self.blaming(member.id):
                action(self._run.cell(member.id), c)
                good.append(c)
        return pack if len(good) == len(pack.members) else pack.only(good)

    def _record(self, pack: Pack, rows: list[Row], append: Callable[[CellFolder, list[Row]], None]) -> Pack:
        for member, row in zip(pack.members, rows, strict=True):
            self._rewards[member.id] = row.get("reward_mean", self._rewards.get(member.id))
        return self._each(pack, lambda folder, c: append(folder, [rows[c]]))

    def _save(self, pack: Pack, durable: bool = True) -> Pack:
        def save(folder: CellFolder, c: int) -> None:
            folder.guard()
            if durable:
                folder.sync()
            checkpoint.write(folder.checkpoint, pack.state(c), durable=durable)

        return self._each(pack, save)

    def _without_diverged(self, pack: Pack) -> Pack:
        lost = pack.diverged()
        if not lost:
            return pack
        self._finish(pack, lost, stopped=True)
        return pack.only([c for c in range(len(pack.members)) if c not in lost])

    def _finish(self, pack: Pack, positions: Sequence[int], stopped: bool = False) -> None:
        for position in positions:
            with self.blaming(pack.members[position].id):
                folder = self._run.cell(pack.members[position].id)
                self.states[folder.id] = conclude(folder, pack, position, stopped, self._orders.world.size)

    def _beat(self, pack: Pack) -> None:
        """A sign of life of every member, not more often than every `BEAT_SECONDS`."""
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return
        self._beaten = time.monotonic()
        for member in pack.members:
            reward, updates = self._rewards.get(member.id), member.cell.training.updates
            with suppress(OSError, Evicted):  # the next row of metrics will tell whether this matters
                self._run.cell(member.id).beat({"update": pack.done, "updates": updates, "reward": reward})

    def _tell(self, member: Member, update: int) -> None:
        self._progress(Progress(member.id, update, member.cell.training.updates, self._rewards.get(member.id)))

    @contextmanager
    def blaming(self, identity: str) -> Iterator[None]:
        """Whatever is raised inside ends this cell, and only this cell."""
        try:
            yield
        except Exception as error:
            self._fail(identity, error)

    def _fail(self, identity: str, error: Exception) -> None:
        if isinstance(error, Evicted):
            self.states[identity] = "cancelled"
            return
        self.states[identity] = "failed"
        text = f"{error}\n" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        print(text, end="", file=sys.stderr)
        with suppress(OSError):  # a full disk: the job's log has the text
            self._run.cell(identity).fail(text)
