"""The processes that train cells together, with collectives that propagate errors.

Every process holds the whole policy, optimizer and reference, and takes the same steps (or, with `policy.sharding`, its
part of them). An exception in one process is sent in the next collective and raised in all of them, so that all stay in
step and can retry with smaller micro-batches, or without the cell that failed. A process that dies or gets out of step
ends the job, which resumes from its checkpoints when it is launched again.

Gradients are summed by torch's `all_reduce` in buckets. Two exchanges are made by hand instead. Objects go through
`messages.py` over `all_gather`, since `torch.distributed.all_gather_object` pickles. And sums do not begin before the
backward passes of all processes have ended, as DistributedDataParallel's would: a process that runs out of memory in
its own could then no longer say so. What decides a step for all (norms of shared-out gradients) is added in the order
of the ranks, in `optim/sharded_optimizer.py`.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from klab.harness.training.distributed.buckets import buckets
from klab.harness.training.distributed.messages import ForgedMessage, decode, encode, message_type
from klab.harness.training.distributed.peers import PeerWatch
from klab.harness.training.packed_cell import CellFailure
from klab.harness.training.runtime.oom import is_out_of_memory

T = TypeVar("T")

_UNDER_WAY = 4
"""Sums that are under way at the same time."""

_END = "end of a step"


class ProcessGroupLost(BaseException):
    """The processes of this job can no longer work together; the job ends, and its checkpoints stay as they are."""


class PropagatedError(Exception):
    """An exception of one process, raised in all of them."""


class PropagatedCellFailure(PropagatedError, CellFailure):
    """A cell failed in one process; raised in all of them."""


@message_type
@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception as sent to the other processes. `position`: of the cell that failed, in the pack."""

    rank: int
    message: str
    text: str
    position: int | None
    memory: bool


class ProcessGroup:
    """`size` processes, of which this one has rank `rank`; rank 0 decides what is done.

    With one process, collectives return their argument unchanged.

    Attributes:
        device_group: torch's group of the same processes for what lies on their devices; None: its default one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        secret: bytes = b"",
        device_group: dist.ProcessGroup | None = None,
        peers: PeerWatch | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device_group = device_group
        self._peers = peers
        self._secret = secret
        self._exchanges = 0
        self._broken = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This process's contiguous part of `count` items; parts differ by at most one, the first are larger."""
        small, larger = divmod(count, self.size)
        first = self.rank * small + min(self.rank, larger)
        return range(first, first + small + (self.rank < larger))

    def assigned(self, count: int) -> range:
        """Indices of the micro-batches, of `count`, that this process computes: every `size`-th, from its rank on."""
        return range(self.rank, count, self.size)

    def all_gather_object(self, name: str, work: Callable[[], T], device: torch.device | str = "cpu") -> list[T]:
        """What `work` returns in each process, by rank; tensors arrive on `device`, detached.

        `name` says what is exchanged: processes that name different things are out of step.

        Raises:
            SharedFailure: in all processes, where `work` raised, or one of them was on its way with an error.
            ProcessGroupLost: where a process is gone or out of step.
        """
        if self.size == 1:
            return [work()]
        error = None
        try:
            message = self._encode((name, work()))
        except Exception as problem:
            error, message = problem, self._encode((name, self._failure(problem)))
        return self._exchange(message, error, device)

    def run_collectively(self, work: Callable[[], T], state: Callable[[], object] = lambda: None) -> T:
        """`work`, which all processes do at the same time, exchanging as they go.

        Args:
            state: what must be equal in all processes when they are done.

        Raises:
            SharedFailure: in all processes, where it raised in one.
            ProcessGroupLost: where one process raised after others were done, or the states differ.
        """
        if self.size == 1:
            return work()
        try:
            value = work()
        except PropagatedError:
            raise
        except Exception as error:
            self._fail(error)
        except BaseException:
            self._broken = True  # the others are somewhere inside
            raise
        states = self.all_gather_object(_END, state)
        for rank, other in enumerate(states):
            if other != states[0]:
                self._lost(f"process {rank} of {self.size} does not have the numbers of process 0 any more")
        return value

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """A block whose collectives are torch's own, as in a pass over shared-out weights: an error in one process
        leaves the others waiting inside, so that it ends the job.

        Raises:
            ProcessGroupLost: where the block raises an exception, unless this process trains alone.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            traceback.print_exc()
            self._lost(f"{type(error).__name__}: {error}")
        except BaseException:
            self._broken = True
            raise

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace contiguous tensors by their sums over all processes, added at least in float32.

        Buckets are summed by torch's `all_reduce`, several under way while others are filled and emptied. All processes
        get the same bits, which depend on their number alone with Gloo; NCCL may add in another order on other GPUs.
        """
        if self.size == 1:
            return
        under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
        for bucket in buckets(tensors):
            flat = torch.cat(bucket).to(torch.promote_types(bucket[0].dtype, torch.float32))
            group = self.device_group if flat.is_cuda else None
            under_way.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
            if len(under_way) == _UNDER_WAY:
                self._take_sum(*under_way.popleft())
        while under_way:
            self._take_sum(*under_way.popleft())

    def _take_sum(self, bucket: list[Tensor], flat: Tensor, work: Any) -> None:
        self._wait(work)
        for part, value in zip(bucket, torch.split(flat, [*map(len, bucket)]), strict=True):
            part.copy_(value)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each parameter's gradient by the sum over all processes; none at all counts as zeros."""
        if self.size == 1:
            return
        listed = list(parameters)

        def ready() -> None:
            for parameter in listed:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = parameter.grad.contiguous()

        self.all_gather_object("gradients", ready)
        self.sum_tensors(each.grad for each in listed if each.grad is not None)

    def close(self) -> None:
        """Leave the group. After a failure on GPUs torch's is not left: NCCL would wait for the others."""
        if self._peers is not None:
            self._peers.close(orderly=not self._broken)
        if dist.is_initialized() and not (self._broken and torch.cuda.is_available()):
            dist.destroy_process_group()

    @property
    def broken(self) -> bool:
        """Whether the processes lost one another, or an exchange was left before its end."""
        return self._broken

    def _encode(self, value: Any) -> bytes:
        return encode(value, self._secret, self.rank, self._exchanges)

    def _exchange(self, message: bytes, error: Exception | None, device: torch.device | str = "cpu") -> list[Any]:
        """Send a message to all processes and receive theirs; raises in all of them where one is a failure."""
        number, self._exchanges = self._exchanges, self._exchanges + 1
        try:
            received = [
                decode(each, self._secret, rank, number, device) for rank, each in enumerate(self._gather(message))
            ]
        except ForgedMessage as forged:
            self._lost(str(forged))
        names, values = [name for name, _ in received], [value for _, value in received]
        failures = [value for value in values if isinstance(value, _Failure)]
        sound = {name for name, value in received if not isinstance(value, _Failure)}
        if len(sound) > 1 or (failures and _END in sound):
            why = "".join(f"\n{failure.text}" for failure in failures)
            self._lost(f"the processes are out of step: {', '.join(map(str, names))}{why}")
        if failures:
            self._raise(failures[0], error if failures[0].rank == self.rank else None)
        return values

    def _fail(self, error: Exception) -> NoReturn:
        """Tell the others, in the exchange in which they wait, that this process raised."""
        self._exchange(self._encode(("an error", self._failure(error))), error)
        raise AssertionError("an exchange with a failure raises")

    def _failure(self, error: Exception) -> _Failure:
        where = f"process {self.rank} of {self.size}"
        position = error.position if isinstance(error, CellFailure) else None
        message = str(error) if isinstance(error, CellFailure) else f"{type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        return _Failure(self.rank, f"{message} ({where})", text, position, is_out_of_memory(error))

    def _raise(self, failure: _Failure, mine: Exception | None) -> NoReturn:
        cause = mine or (MemoryError if failure.memory else RuntimeError)(failure.text)
        if failure.position is None:
            raise PropagatedError(failure.message) from cause
        raise PropagatedCellFailure(failure.position, failure.message) from cause

    def _gather(self, message: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(dist.all_gather(sizes, torch.tensor([len(mine)]), async_op=True))
        longest = int(max(sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        self._wait(dist.all_gather(parts, padded, async_op=True))
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _wait(self, work: Any) -> None:
        """Wait in Python, where signals are heard. NCCL's work goes on by itself, in the order of its stream."""
        pause = 5e-5
        try:
            while not work.is_completed():
                if self._peers is not None and self._peers.lost is not None:
                    self._lost("an exchange is left")
                time.sleep(pause)
                pause = min(pause * 1.5, 0.01)
            work.wait()
        except RuntimeError as error:
            self._lost(f"a process of this job is gone: {error}")
        except BaseException:
            self._broken = True
            raise

    def _lost(self, why: str) -> NoReturn:
        self._broken = True
        who = self._peers.who_is_lost() if self._peers is not None else None
        raise ProcessGroupLost(f"klab: process {self.rank} of {self.size}: {f'{who}; {why}' if who else why}")


SINGLE_PROCESS = ProcessGroup()
"""The group of a process that trains alone."""


def checksum(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """A number per tensor, which changes when one of its bits does."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [each.detach().view(kinds[each.element_size()]).sum(dtype=torch.int64) for each in tensors]
    return tuple(torch.stack(sums).tolist()) if sums else ()
