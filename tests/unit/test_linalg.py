"""Functions on tensors against float64: blocks, packing, inverses, the polar factor, averages, precision."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lngd.linalg import (
    fast_bfloat16,
    index_tensor,
    inverse,
    kept_dtype,
    matmul_dtype,
    pack,
    packed_shape,
    polar_root,
    state_dtype,
    unpack,
    whitener,
)
from tests.helpers import BF16_INSTRUCTIONS, cpu_with
from tests.reference import newton_schulz

BF16, CPU = torch.bfloat16, torch.device("cpu")


# Blocks


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 17), batch=st.integers(1, 3))
def test_packing_is_exact_in_half_the_memory(n: int, batch: int) -> None:
    x = torch.randn(batch, 2, n, n)
    matrix = x + x.mT
    packed = pack(matrix)
    assert packed.shape == (batch, 2, *packed_shape(n))
    assert packed[0, 0].numel() <= (n + 1) * (n + 2) / 2
    assert torch.equal(unpack(packed, n), matrix)


# Inverses


def spd(n: int, condition: float, dtype: torch.dtype) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, n, n, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return ((q * values) @ q.mT).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-12)])
def test_whitener(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    matrix = spd(33, 1e3, dtype)
    found, ok, condition = whitener(matrix)
    assert ok.all() and (condition > 1).all()
    assert torch.equal(found, found.tril())
    whole = found.double() @ matrix.double() @ found.double().mT
    assert (whole - torch.eye(33).double()).abs().max() < tolerance


@pytest.mark.parametrize("method", [inverse, whitener])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_matrix_does_not_spoil_the_batch(method: Any, bad: float) -> None:
    matrix = spd(8, 10, torch.float32)
    matrix[1] = bad
    found, ok, _ = method(matrix)
    assert ok.tolist() == [True, False, True]
    good, _, _ = method(matrix[::2])
    torch.testing.assert_close(found[::2], good)


def test_retry_saves_what_float32_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    real = torch.linalg.cholesky_ex

    def fail_in_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix.dtype)
        factor, info = real(matrix)
        return factor, info if matrix.dtype == torch.float64 else torch.ones_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_in_float32)
    result, ok, _ = inverse(torch.eye(3).expand(2, 3, 3) * 2)
    assert calls == [torch.float32, torch.float64] and ok.all()
    torch.testing.assert_close(result, torch.eye(3).expand(2, 3, 3) / 2)


# The polar factor


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 6), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_polar_root_gives_the_polar_factor(shape: tuple[int, ...], scale: float) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double(), False)
    values = torch.logspace(-1.2, 0, u.shape[-1]).double()
    x = (u * values) @ vh * scale
    orthogonal = polar_root(x @ x.mT) @ x
    torch.testing.assert_close(orthogonal, u @ vh, rtol=0, atol=0.05)
    torch.testing.assert_close(orthogonal[0], newton_schulz(x[0]), rtol=0, atol=1e-9)
    if shape[1] == 1:
        torch.testing.assert_close(orthogonal, u @ vh, rtol=0, atol=1e-12)


WIDE = pytest.param((1, 1040, 1040), marks=pytest.mark.slow)  # a minute where bfloat16 is emulated


@pytest.mark.parametrize("shape", [(3, 64, 576), (2, 128, 1152), (2, 256, 256), WIDE], ids=str)
@pytest.mark.parametrize("decades", [0.0, 1.5])
def test_half_precision_does_not_blow_up(shape: tuple[int, ...], decades: float) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -decades, shape[-1])
    half = x.bfloat16()
    found = polar_root(half @ half.mT) @ half
    assert torch.linalg.matrix_norm(found.float(), 2).max() < 1.16


def test_zeros_have_no_direction() -> None:
    x = torch.zeros(2, 3, 4)
    x[0] = torch.eye(3, 4)
    found = polar_root(x @ x.mT) @ x
    torch.testing.assert_close(found, x, rtol=0, atol=0.02)


# Averages, damping, rates


# Precision


@pytest.mark.parametrize("name", BF16_INSTRUCTIONS)
def test_a_cpu_is_asked_for_its_instructions(name: str) -> None:
    with cpu_with(name):
        assert fast_bfloat16(CPU) and matmul_dtype(torch.float32, CPU) == BF16
        assert matmul_dtype(torch.float64, CPU) == torch.float64
    with cpu_with():
        assert not fast_bfloat16(CPU) and matmul_dtype(torch.float32, CPU) == torch.float32


def test_cuda_is_asked_for_its_generation() -> None:
    for generation, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        with patch.object(torch.cuda, "get_device_capability", lambda _, g=generation: g):
            assert fast_bfloat16(torch.device("cuda")) is fast
    assert fast_bfloat16(torch.device("mps")) and fast_bfloat16(torch.device("meta"))


def test_what_is_kept_is_no_matter_of_the_device() -> None:
    assert (kept_dtype(torch.float32), kept_dtype(torch.float64)) == (BF16, torch.float64)
    assert [state_dtype(t) for t in (BF16, torch.float16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip


def test_indices_are_copied_to_a_device_once() -> None:
    found = index_tensor((3, 1), CPU)
    assert found.tolist() == [3, 1] and index_tensor((3, 1), CPU) is found
