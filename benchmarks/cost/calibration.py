"""This machine in numbers: micro-benchmarks of every kind of operation in `benchmarks.cost.model`, one thread.

Matrix products and inverses are timed at the shapes that are asked for; elementwise work at sizes from 4 KiB to
64 MiB, between which the seconds are interpolated. `stream` and `adamw` walk through more memory than a cache holds.
Seconds are the thread's own: what else runs on the core is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.cost.model import BYTES, INVERSE, PRODUCTS, Op

SIZES = [2**power for power in range(10, 25, 2)]
COLD = 2**25  # floats that one round of a cold benchmark walks through: 128 MiB
REPEATS = 3  # of a small call: the smallest of the models that are checked has three banks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def clock(work: Callable[[int], object], seconds: float, least: int = 5) -> float:
    """Median seconds of `work(turn)`, over at least so many turns and about so long; one turn before is not counted."""
    work(0)
    found: list[float] = []
    start = time.thread_time()
    while len(found) < least or (time.thread_time() - start < seconds and len(found) < 2_000):
        before = time.thread_time()
        work(len(found) + 1)
        found.append(time.thread_time() - before)
    return median(found)


def elementwise(kind: str, size: int) -> Callable[[int], object]:
    """The work of one elementwise kind on so many elements."""
    cold = kind in ("stream", "adamw")
    tensors = 4 if kind == "adamw" else 2
    places = max(1, COLD // (tensors * size)) if cold else 1
    x = torch.randn(places, tensors, size)
    if kind == "adamw":
        x[:, 3].abs_()
        count = torch.tensor(3.0)

        def fused(turn: int) -> None:
            w, g, mean, square = x[turn % places]
            adamw([w], [g], [mean], [square], [], [count], foreach=None, fused=True, amsgrad=False, beta1=0.9,
                  beta2=0.999, lr=1e-9, weight_decay=0.1, eps=1e-8, maximize=False)  # fmt: skip

        return fused
    half = x[0, 0].bfloat16()
    return {
        "stream": lambda turn: x[turn % places, 0].lerp_(x[turn % places, 1], 0.1),
        "inplace": lambda turn: x[0, 0].lerp_(x[0, 1], 0.1),
        "alloc": lambda turn: x[0, 0] * x[0, 1],
        "cast": lambda turn: x[0, 0].to(torch.bfloat16),
        "half": lambda turn: half / 1.01,
        "reduce": lambda turn: torch.linalg.vector_norm(x[0, 0]),
    }[kind]


def cold_call(seconds: float) -> float:
    """Seconds of a small call among unlike ones, each made `REPEATS` times right after the cache was emptied: as in a
    training step, where forward and backward drove the optimizer's code and objects out and some banks follow."""
    x, rows, buffer = torch.randn(6, 8, 8), torch.tensor([1, 3]), torch.zeros(2**24)
    weights = [torch.randn(8, 8) for _ in range(3)]
    calls: list[Callable[[], object]] = [
        lambda: x[rows], lambda: x.view(-1, 4), lambda: x.unflatten(0, (2, 3)), lambda: torch.cat([x, x]),
        lambda: torch.where(x > 0, x, 0.0), lambda: x.sum(-1), lambda: (x.abs() + 1).rsqrt(), lambda: x.mul(2.0),
        lambda: x.lerp(x, 0.5), lambda: torch.linalg.vector_norm(x, dim=(-2, -1)), lambda: x.square().mean(-1),
        lambda: torch.nn.functional.pad(x, (0, 1)), lambda: torch.baddbmm(x, x, x), lambda: x @ x.mT,
        lambda: torch.stack([x, x]), lambda: x.repeat_interleave(2, 0), lambda: x.clamp_min(0), lambda: x.isfinite(),
        lambda: x.flatten(1).all(1), lambda: x.diagonal(dim1=-2, dim2=-1), lambda: x.amax((-2, -1)),
        lambda: x.to(torch.bfloat16), lambda: x.new_zeros(3), lambda: torch._foreach_mul_(weights, 0.5),
        lambda: torch._foreach_sub_(weights, weights), lambda: x.unbind(0), lambda: x.reshape(6, 64), lambda: x.clone(),
    ]  # fmt: skip

    def work(turn: int) -> float:
        flush(buffer)
        start = time.thread_time()
        for call in calls * REPEATS:
            call()
        return (time.thread_time() - start) / (REPEATS * (len(calls) + 4))  # four of them are two calls

    work(0)
    return median(work(turn) for turn in range(max(5, round(seconds * 200))))


def product(kind: str, shape: tuple[int, ...]) -> Callable[[int], object]:
    """A matrix product; of one matrix as torch's `mm`."""
    batch, rows, inner, columns = shape
    dtype = DTYPES[kind]
    x, y = torch.randn(batch, rows, inner).to(dtype), torch.randn(batch, inner, columns).to(dtype)
    if batch == 1:
        return lambda turn: x[0] @ y[0]
    return lambda turn: x @ y


def inverse(shape: tuple[int, ...]) -> Callable[[int], object]:
    """By Cholesky, of a well-conditioned symmetric matrix."""
    batch, n = shape
    x = torch.randn(batch, 2 * n, n)
    matrix = x.mT @ x / n + 0.1 * torch.eye(n)
    return lambda turn: torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])


class Measured:
    """A machine by its micro-benchmarks; what was not measured yet is, when it is asked for.

    Args:
        seconds_each: spent on one benchmark.
    """

    def __init__(self, seconds_each: float = 0.15) -> None:
        self.seconds_each = seconds_each
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.shapes: dict[tuple[str, tuple[int, ...]], float] = {}

    def seconds(self, op: Op) -> float:
        """Of one of its times."""
        if op.kind in PRODUCTS or op.kind == INVERSE:
            key = (op.kind, op.shape)
            if key not in self.shapes:
                work = inverse(op.shape) if op.kind == INVERSE else product(*key)
                self.shapes[key] = clock(work, self.seconds_each)
            return self.shapes[key]
        if op.kind not in self.curves:
            if op.kind == "call":
                self.curves["call"] = [(1, cold_call(self.seconds_each))]
            else:
                self.curves[op.kind] = [(n, clock(elementwise(op.kind, n), self.seconds_each)) for n in SIZES]
        return interpolate(self.curves[op.kind], math.prod(op.shape))

    def to_dict(self) -> dict[str, object]:
        """For a file: GB/s by kind and size, GFLOP/s by shape, microseconds of a call."""
        rates = {
            kind: {str(n): round(BYTES[kind] * n / t / 1e9, 2) for n, t in curve}
            for kind, curve in self.curves.items()
            if kind != "call"
        }
        products = {
            f"{kind} {' × '.join(map(str, shape))}": round(Op(kind, shape).flops / t / 1e9, 1)
            for (kind, shape), t in self.shapes.items()
        }
        call = self.curves.get("call", [(0, 0.0)])[0][1]
        return {"gigabytes_a_second": rates, "gigaflops": products, "microseconds_a_call": round(call * 1e6, 2)}


def interpolate(curve: list[tuple[int, float]], size: float) -> float:
    """Seconds at a size: on straight lines between the measured ones, in proportion beyond the last, flat below."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (small, low), (large, high) in zip(curve, curve[1:], strict=False):
        if size <= large:
            return low + (high - low) * (size - small) / (large - small)
    return curve[-1][1] * size / curve[-1][0]


def flush(buffer: Tensor) -> None:
    """Drives what a step would not find in the cache out of it."""
    buffer.sum()
