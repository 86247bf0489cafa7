"""Runs a function on several processes of this machine at once, on gloo, one thread each."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=120)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of a module's function by rank, in a process group of `ranks`; its first exception is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(ranks, mp_context=context) as pool:
            found = [pool.submit(_run, rank, ranks, folder, function, arguments) for rank in range(ranks)]
            return [each.result() for each in found]


def _run(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
