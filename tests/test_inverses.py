"""Packed storage is exact; inverses and inverse roots against float64; failures are flagged matrix by matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lngd.curvature.factors import add_damping
from hf_lngd.curvature.inverses import eigenbasis, inverse, inverse_sqrt, pack, packed_shape, unpack, whitener


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 17), batch=st.integers(1, 3))
def test_packing_is_exact_in_half_the_memory(n: int, batch: int) -> None:
    x = torch.randn(batch, 2, n, n)
    matrix = x + x.mT
    packed = pack(matrix)
    assert packed.shape == (batch, 2, *packed_shape(n))
    assert packed[0, 0].numel() <= (n + 1) * (n + 2) / 2
    assert torch.equal(unpack(packed, n), matrix)


def spd(n: int, condition: float, dtype: torch.dtype) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, n, n, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return ((q * values) @ q.mT).to(dtype)


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.float64, 1e-9)])
def test_inverse_root(method: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    matrix = spd(33, 1e3, dtype)
    root, ok, condition = inverse_sqrt(matrix, 1e-3, method)
    whole = root.double() @ (matrix.double() + 1e-3 * torch.eye(33).double()) @ root.double()
    assert ok.all()
    assert (whole - torch.eye(33).double()).abs().max() < tolerance
    assert method == "newton" or torch.allclose(condition.double(), torch.tensor(1.001 / 0.002).double(), rtol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-12)])
def test_whitener(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    matrix = spd(33, 1e3, dtype)
    found, ok, condition = whitener(matrix)
    assert ok.all() and (condition > 1).all()
    assert torch.equal(found, found.tril())
    whole = found.double() @ matrix.double() @ found.double().mT
    assert (whole - torch.eye(33).double()).abs().max() < tolerance


@pytest.mark.parametrize("method", ["eigh", "newton", "whitener"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_matrix_does_not_spoil_the_batch(method: str, bad: float) -> None:
    def root_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return whitener(x) if method == "whitener" else inverse_sqrt(x, 0.1, method)

    matrix = spd(8, 10, torch.float32)
    matrix[1] = bad
    root, ok, _ = root_of(matrix)
    assert ok.tolist() == [True, False, True]
    good, _, _ = root_of(matrix[::2])
    torch.testing.assert_close(root[::2], good)


def test_inverse_and_its_retry_in_float64() -> None:
    torch.manual_seed(0)
    matrix = spd(20, 1e12, torch.float64)[:1]
    matrix = torch.cat((matrix, spd(20, 10, torch.float64)[:1]))
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
    negative = -torch.eye(4).expand(1, 4, 4)
    assert not inverse(negative)[1].any()


def test_retry_saves_what_float32_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    real = torch.linalg.cholesky_ex

    def fail_in_float32(matrix: torch.Tensor):
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


@pytest.mark.parametrize("told", [True, False], ids=["raised", "silent"])
def test_an_eigenbasis_that_fails_is_sought_in_float64(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK raises for the whole batch, or gives NaN for one matrix and says nothing."""
    real = torch.linalg.eigh

    def fail(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if matrix.dtype == torch.float64:
            return real(matrix)
        if told:
            raise torch.linalg.LinAlgError("no convergence")
        values, vectors = real(matrix)
        vectors[1] = torch.nan
        return values, vectors

    matrix = spd(9, 100, torch.float32)
    expected = real(matrix.double()).eigenvalues.float()
    matrix = torch.cat((matrix, torch.full((1, 9, 9), torch.inf)))
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors, ok = eigenbasis(matrix)
    assert ok.tolist() == [True, True, True, False]
    torch.testing.assert_close(values[:3], expected, rtol=1e-3, atol=1e-5)
    back = (vectors[:3] * values[:3, None, :]) @ vectors[:3].mT
    torch.testing.assert_close(back, matrix[:3], rtol=1e-3, atol=1e-5)
