"""Processes that stay: one pool for each world size, on gloo, one thread each, so that a test costs no start."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Long enough for the slowest step here, short enough that a hang is seen as one.
TIMEOUT = 60


def _work(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    # what accelerate and transformers look at
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(**arguments)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class DistPool:
    """`size` processes that wait for functions to run.

    Args:
        size: how many.
        folder: for the file through which they meet.
        module: whose functions they will run.
    """

    def __init__(self, size: int, folder: Path, module: str) -> None:
        self.size, self._folder, self._module, self._starts = size, folder, module, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self._module])  # torch and transformers are imported once for all
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._starts += 1
        store = str(self._folder / f"store{self.size}.{self._starts}")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, store, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """The results of a module's function on every rank; fails where one rank does, and starts anew: a collective
        that a rank has left half way is of no use to the next test."""
        answers = self.outcomes(function, **arguments)
        if not all(returned for returned, _ in answers):
            self.close()
            self._start()
        return [self._value(rank, *answer) for rank, answer in enumerate(answers)]

    def outcomes(self, function: Callable[..., Any], **arguments: Any) -> list[tuple[bool, Any]]:
        """Of every rank: whether it returned, and the value, the error's text or (its process died) the exit code."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        return [self._answer(rank) for rank in range(self.size)]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv() if self._pipes[rank].poll(2 * TIMEOUT) else (False, "no answer")
        except EOFError:
            self._processes[rank].join()
            return False, self._processes[rank].exitcode

    def _value(self, rank: int, returned: bool, value: Any) -> Any:
        assert returned, f"rank {rank}: {value}"
        return value

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


Pools = dict[int, DistPool]


def open_pools(folder: Path, module: str, sizes: tuple[int, ...] = (2, 4)) -> Iterator[Pools]:
    """A pool of each size, for as long as a fixture lives."""
    made = {size: DistPool(size, folder, module) for size in sizes}
    yield made
    for pool in made.values():
        pool.close()
