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
    add_damping,
    apply_left,
    apply_right,
    block_layout,
    damping,
    fast_bfloat16,
    from_blocks,
    index_tensor,
    input_statistic,
    inverse,
    kept_dtype,
    matmul_dtype,
    orthogonalize,
    pack,
    packed_shape,
    rms_rate,
    running_average,
    state_dtype,
    to_blocks,
    trace,
    unpack,
    whitener,
)
from tests.reference import blockwise, damping_of, newton_schulz

BF16, CPU = torch.bfloat16, torch.device("cpu")
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def dense(blocks: Tensor, size: int) -> Tensor:
    """[k, b, b] → the matrix."""
    return torch.block_diag(*blocks)[:size, :size]


# Blocks


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 40), limit=st.integers(1, 50), rows=st.integers(1, 4))
def test_blocks_lose_nothing(columns: int, limit: int, rows: int) -> None:
    k, b = block_layout(columns, limit)
    assert b <= limit and k * b >= columns
    x = torch.randn(2, rows, columns)
    assert torch.equal(from_blocks(to_blocks(x, k, b), columns), x)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 9), n=st.integers(1, 6), limit=st.integers(1, 10), masked=st.booleans())
def test_products_with_blocks_are_those_with_the_matrix(d: int, n: int, limit: int, masked: bool) -> None:
    torch.manual_seed(d)
    k, b = block_layout(d, limit)
    x, blocks = torch.randn(2, n, d).double(), torch.randn(2, k, b, b).double()
    weight = torch.rand(n).double() if masked else None
    statistic = input_statistic(x, weight, k, b)
    for i in range(2):
        whole = dense(blocks[i], d)
        torch.testing.assert_close(apply_right(x, blocks)[i], x[i] @ whole)
        torch.testing.assert_close(apply_left(blocks, x.mT)[i], whole @ x[i].T)
        torch.testing.assert_close(trace(blocks)[i], dense(blocks[i], k * b).trace())
        gram = x[i].T @ (x[i] if weight is None else x[i] * weight[:, None])
        torch.testing.assert_close(dense(statistic[i], d), blockwise(gram, k, b))


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


def test_inverse_and_its_retry_in_float64() -> None:
    torch.manual_seed(0)
    matrix = torch.cat((spd(20, 1e12, torch.float64)[:1], spd(20, 10, torch.float64)[:1]))
    exact = torch.linalg.inv(matrix)
    result, ok, condition = inverse(matrix)
    assert ok.all() and condition[0] > condition[1] >= 1
    assert ((result - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max() < 1e-3
    # the float32 rounding of an exactly singular matrix plus a shift below its precision
    ones = torch.ones(2, 6, 6)
    ones[0] += 1e-8 * torch.eye(6)
    ones[1] += torch.eye(6)
    result, ok, _ = inverse(ones)
    assert ok.tolist() == [False, True]
    assert torch.isfinite(result[1]).all()
    assert not inverse(-torch.eye(4).expand(1, 4, 4))[1].any()


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


def test_what_is_damped_is_symmetric_to_the_last_bit() -> None:
    matrix = torch.randn(2, 3, 5, 5)
    lam = torch.tensor([0.5, 2.0])[:, None].expand(2, 3)
    damped = add_damping(matrix, lam)
    assert torch.equal(damped, damped.mT)
    torch.testing.assert_close(damped, (matrix + matrix.mT) / 2 + lam[..., None, None] * torch.eye(5))


# The polar factor


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6), (1, 7, 7), (3, 1, 4), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthogonalize_is_the_polar_factor(shape: tuple[int, ...], scale: float) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double(), False)
    values = torch.logspace(-2, 0, u.shape[-1]).double()
    x = (u * values) @ vh * scale
    found = u.mT @ orthogonalize(x) @ vh.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=1e-9)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=0.15)
    torch.testing.assert_close(orthogonalize(x)[0], newton_schulz(x[0]), rtol=0, atol=1e-9)
    if min(shape[1:]) == 1:
        torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=1e-12)


WIDE = pytest.param((1, 1040, 1040), marks=pytest.mark.slow)  # a minute where bfloat16 is emulated


@pytest.mark.parametrize("shape", [(3, 64, 576), (2, 128, 1152), (2, 256, 256), WIDE], ids=str)
def test_half_precision_does_not_blow_up(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    assert torch.linalg.matrix_norm(orthogonalize(x.bfloat16()).float(), 2).max() < 1.16


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


# Averages, damping, rates


def test_a_running_average_passes_over_what_is_not_finite() -> None:
    values = torch.randn(3, 2, 5, 4).double()
    values[1, 0, 2, 2] = torch.nan
    average, weight = torch.zeros(2, 5, 4).double(), torch.zeros(2).double()
    for value in values:
        average, weight = running_average(average, value, weight, 0.9)
    for i, seen in enumerate(([0, 2], [0, 1, 2])):
        weights = [0.1 * 0.9 ** (len(seen) - 1 - j) for j in range(len(seen))]
        exact = sum(w * values[s, i] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(average[i] / weight[i], exact)


@pytest.mark.parametrize("mean", [0.0, 1e-7, 1e-3, 5.0])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_damping_is_that_of_the_papers_factor(mean: float, scale: float) -> None:
    value = torch.tensor([mean], dtype=torch.float64)
    for kind in ("relative", "paper"):
        found = damping(value, kind, 0.3, (1e-5, 1e-2), scale) * scale
        assert float(found) == pytest.approx(damping_of(mean * scale, kind, 0.3, 1e-5, 1e-2), abs=1e-18)


def test_a_rate_of_nothing_is_zero() -> None:
    x = torch.stack((torch.zeros(3, 4), torch.randn(3, 4)))
    rate = rms_rate(torch.linalg.vector_norm(x, dim=(1, 2)), 12, 0.2)
    assert rate[0] == 0
    torch.testing.assert_close((rate[1] * x[1]).square().mean().sqrt(), torch.tensor(0.2))


# Precision


def cpu_with(*names: str) -> Any:
    """A CPU that has these instructions for bfloat16 alone."""
    capabilities = {"avx512_f": True, "architecture": "x86_64"} | {name: name in names for name in INSTRUCTIONS}
    return patch.object(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize("name", INSTRUCTIONS)
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
