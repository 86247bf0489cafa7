"""Inverses and inverse roots of symmetric matrices in batches, and their storage in half the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Polar Express (Amsel, Persson, Musco, Gower 2025): the minimax quintic of each step for singular values in
# [1e-3, 1]; the last one repeats. `inverse_sqrt` applies them to a Gram matrix, so to eigenvalues in [1e-6, 1].
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)

# ‖I − R A R‖ above which a root R by Newton's iteration does not count: met from a condition of about 3e7 on.
NEWTON_TOLERANCE = 0.1


def packed_shape(n: int) -> tuple[int, int]:
    """Shape in which :func:`pack` keeps a symmetric n × n matrix."""
    half = -(-n // 2)
    return 2 * half + 1, half


def pack(matrix: Tensor) -> Tensor:
    """Symmetric [..., n, n] → rectangular full packed form, exact, half the memory (odd n: one zero row more).

    With A = [[A₁₁, A₂₁ᵀ], [A₂₁, A₂₂]] the rectangle holds the lower triangle of the left half columns, one row
    down, and the upper triangle of A₂₂ in the place that this leaves (Gustavson et al. 2010, LAPACK's RFP).
    """
    n = matrix.shape[-1]
    if n % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    half = matrix.shape[-1] // 2
    packed = torch.nn.functional.pad(matrix[..., :half], (0, 0, 1, 0))
    upper = _upper(half, matrix.device)
    packed[..., :half, :] = torch.where(upper, matrix[..., half:, half:], packed[..., :half, :])
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The symmetric [..., n, n] that :func:`pack` was given."""
    half = packed.shape[-1]
    full = packed.new_empty(*packed.shape[:-2], 2 * half, 2 * half)
    upper = _upper(half, packed.device)
    first, second, below = packed[..., 1 : half + 1, :], packed[..., :half, :], packed[..., half + 1 :, :]
    full[..., :half, :half] = torch.where(upper, first.mT, first)
    full[..., half:, half:] = torch.where(upper, second, second.mT)
    full[..., half:, :half] = below
    full[..., :half, half:] = below.mT
    return full[..., :n, :n]


def _upper(n: int, device: torch.device) -> Tensor:
    """[n, n], True on and above the diagonal."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu()


def inverse(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of positive definite matrices by Cholesky.

    A matrix that fails in its own precision is tried again in float64: on the CPU those that need it, on an
    accelerator all of them at once, since to ask which would wait for the device.

    Args:
        matrix: [..., n, n], symmetric.

    Returns:
        inverse [..., n, n], ok [...] (False: the inverse is not to be used), condition estimate [...] (of the
        diagonal of the Cholesky factor, a lower bound).
    """
    return _from_cholesky(matrix, torch.cholesky_inverse)


def whitener(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V = L⁻¹ of positive definite A = L Lᵀ, lower triangular: VᵀV = A⁻¹, so rows g become g Vᵀ of unit covariance.

    A fraction of the cost of A^(-1/2), and as good where only VᵀV matters: the two differ by a rotation.

    Args and returns as of :func:`inverse`.
    """
    return _from_cholesky(matrix, lambda factor: torch.linalg.solve_triangular(factor, _eye_like(factor), upper=False))


def _from_cholesky(matrix: Tensor, solve: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    on_cpu = matrix.device.type == "cpu"
    result, ok, condition = _cholesky(matrix if on_cpu else matrix.double(), matrix.dtype, solve)
    if on_cpu and matrix.dtype != torch.float64 and not bool(ok.all()):
        again, again_ok, again_condition = _cholesky(matrix[~ok].double(), matrix.dtype, solve)
        result[~ok], condition[~ok] = again, again_condition
        ok = ok.clone()
        ok[~ok] = again_ok
    return result, ok, condition


def _cholesky(matrix: Tensor, dtype: torch.dtype, solve: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite = (info == 0) & torch.isfinite(factor.sum((-2, -1)))
    # cholesky_inverse raises for the whole batch if one factor is unusable
    factor = torch.where(finite[..., None, None], factor, _eye_like(factor))
    result = solve(factor).to(dtype)
    ok = finite & torch.isfinite(result.sum((-2, -1)))
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square().to(dtype)
    return result, ok, condition


def inverse_sqrt(matrix: Tensor, shift: Tensor | float, method: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(A + shift·I)^(-1/2) of positive semi-definite matrices.

    Args:
        matrix: [..., n, n], symmetric; small negative eigenvalues (rounding) count as zero.
        shift: a number, or a tensor of the leading shape.
        method: ``eigh``, ``newton``, or ``auto`` (eigh on the CPU, newton elsewhere).

    Returns:
        root, ok, condition (of A + shift·I), as :func:`inverse`. `newton` does not know the condition: NaN; a
        matrix of a condition that it cannot do is not ok.
    """
    lam = shift if isinstance(shift, Tensor) else matrix.new_full((), shift)
    lam = lam.to(matrix.dtype).expand(matrix.shape[:-2])
    matrix = (matrix + matrix.mT) * 0.5
    if uses_newton(method, matrix.device):
        return _newton_inverse_sqrt(matrix, lam)
    return _eigh_inverse_sqrt(matrix, lam)


def uses_newton(method: str, device: torch.device) -> bool:
    """Whether `method` means Newton's iteration on this device."""
    return method == "newton" or (method == "auto" and device.type != "cpu")


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices; waits for the device.

    Single precision fails now and then where many eigenvalues are zero, and may not say so: the vectors are NaN. Such a
    matrix is tried again in float64.

    Args:
        matrix: [..., n, n].

    Returns:
        values [..., n], ascending, vectors [..., n, n] in columns, ok [...] (False: they are not to be used).
    """
    finite = torch.isfinite(matrix.flatten(-2)).all(-1)
    # LAPACK refuses the whole batch for one bad matrix
    safe = torch.where(finite[..., None, None], matrix, _eye_like(matrix))
    values, vectors, ok = _eigh(safe)
    if matrix.dtype != torch.float64 and not matrix.is_meta and not bool(ok.all()):
        again_values, again_vectors, again_ok = _eigh(safe[~ok].double())
        values[~ok], vectors[~ok] = again_values.to(matrix.dtype), again_vectors.to(matrix.dtype)
        ok = ok.masked_scatter(~ok, again_ok)
    return values, vectors, finite & ok


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        nothing = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
        return torch.ones_like(matrix[..., 0]), matrix.clone(), nothing
    return values, vectors, torch.isfinite(vectors.flatten(-2)).all(-1)


def _eigh_inverse_sqrt(matrix: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors, found = eigenbasis(matrix)
    values = values.clamp_min(0) + lam.unsqueeze(-1)
    root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    ok = found & torch.isfinite(lam) & torch.isfinite(root.flatten(-2)).all(-1)
    return root, ok, values[..., -1] / values[..., 0]


def _newton_inverse_sqrt(matrix: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(lam.unsqueeze(-1))
    # both bound the largest eigenvalue; 1.01 keeps rounding from lifting it above 1, where the quintics diverge
    bound = torch.minimum(shifted.abs().sum(-1).amax(-1), shifted.norm(dim=(-2, -1))) * 1.01
    residual = shifted / bound[..., None, None]
    root = _eye_like(matrix).expand_as(matrix)
    for a, b, c in POLAR_EXPRESS:
        quintic = b * residual + c * (residual @ residual)
        quintic.diagonal(dim1=-2, dim2=-1).add_(a)
        root = root @ quintic
        residual = quintic @ residual @ quintic
        residual = (residual + residual.mT) * 0.5
    root = (root + root.mT) * (0.5 * bound.rsqrt()[..., None, None])
    # what is left of A after the iteration is I, unless the condition is past what the quintics were made for
    residual.diagonal(dim1=-2, dim2=-1).sub_(1)
    ok = torch.isfinite(root.flatten(-2)).all(-1) & (torch.linalg.matrix_norm(residual) < NEWTON_TOLERANCE)
    return root, ok, torch.full_like(lam, torch.nan)
