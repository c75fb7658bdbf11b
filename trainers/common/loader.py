"""Data order as arithmetic: a global position decides the sample, so the state of the data is one integer."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import resource
import signal
import sys
from collections.abc import Iterator
from types import TracebackType

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from backlot.samples import Order, SampleKey

MANY_FILES = 2**16


class StreamSampler(Sampler[list[SampleKey]]):
    """This rank's micro-batches from a position on, without end.

    The processes take turns: micro-batch m of rank r starts at `start + (m * num_processes + r) * batch_size`.
    """

    def __init__(self, order: Order, batch_size: int, start: int = 0, rank: int = 0, num_processes: int = 1):
        self.order, self.batch_size, self.start = order, batch_size, start
        self.rank, self.num_processes = rank, num_processes

    def __iter__(self) -> Iterator[list[SampleKey]]:
        position = self.start + self.rank * self.batch_size
        while True:
            yield self.order.keys(position, self.batch_size)
            position += self.batch_size * self.num_processes


def create_loader(dataset: Dataset, sampler: StreamSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader over this rank's stream. It never goes through `accelerator.prepare`: the sampler already shares out.

    What a worker fails at, handing over a batch included, is raised where the batch is waited for.
    """
    _allow_many_files()
    # Without it an error in the trainer would not end it: Python waits for its workers, which ignore its SIGTERM.
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else making an iterator would draw from the global one
    )


def abandon_workers() -> None:
    """End the loader's processes at once, just before this one: a dataset that hangs would keep it from ending."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for worker in multiprocessing.active_children():
        worker.kill()  # they ignore the SIGTERM of Python's own clean-up, and it would wait for them


def _end_workers() -> None:
    """At the trainer's end: a worker that fails, and made it fail, is given the time to say why."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise their end as an error, here
    workers = multiprocessing.active_children()
    try:
        multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=0.5)
    finally:
        abandon_workers()


def _allow_many_files() -> None:
    """Raise the limit of open files as far as this user may: each tensor on its way from a worker is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MANY_FILES)  # not a billion where that is allowed: programs exist that try them one by one
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepare_worker(worker: int) -> None:
    # A scheduler signals the whole process group; the loader has to go on until the trainer has saved.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Both are threads that print an error and go on, while the trainer waits for ever for the batch: the one that
    # sends batches, and the one that hands out their memory, whose errors go to sys.excepthook.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error_instead
    sys.excepthook = _end_worker


def _send_error_instead(queue: multiprocessing.queues.Queue, error: Exception, batch: tuple[int, object]) -> None:
    """In a worker: give the trainer the error in place of the batch that could not be sent; end if that fails too."""
    sent = False
    try:
        number, content = batch
        if not isinstance(content, ExceptionWrapper):
            failure = RuntimeError(_explain(error))
            where = f"in loader process {get_worker_info().id}"
            queue.put((number, ExceptionWrapper((RuntimeError, failure, error.__traceback__), where)))
            sent = True
    finally:
        if not sent:
            os._exit(1)  # torch notices


def _end_worker(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """In a worker: end it, so that torch ends the trainer."""
    print(_explain(error), file=sys.stderr, flush=True)
    os._exit(1)


def _explain(error: BaseException) -> str:
    text = f"a loader process could not hand over a batch: {error}"
    if getattr(error, "errno", None) == errno.EMFILE:
        text += f" (the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: ulimit -n)"
    return text
