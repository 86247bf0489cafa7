"""The maths of LNGD as pure functions of tensors; equations are those of Liu et al., NeurIPS 2024.

Symbols: N positions (tokens, patches), d inputs of a layer (the bias, where it is part of the factor, is a last
input of ones), m outputs. Φ is kept as k equal diagonal blocks of size b with k·b ≥ d: columns past d are zero.
A leading ``...`` is any number of batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inverses import POLAR_EXPRESS


def block_layout(columns: int, limit: int) -> tuple[int, int]:
    """(k, b): how Φ of this many columns is cut so that no block is wider than `limit`. k = 1 leaves it whole."""
    k = -(-columns // limit)
    return k, -(-columns // k)


def to_blocks(x: Tensor, k: int, b: int) -> Tensor:
    """[..., n, d] → [..., k, n, b]: columns cut into blocks, zeros after the last."""
    if k == 1:
        return x.unsqueeze(-3)
    if (padding := k * b - x.shape[-1]) > 0:
        x = torch.nn.functional.pad(x, (0, padding))
    return x.unflatten(-1, (k, b)).transpose(-2, -3)


def from_blocks(x: Tensor, columns: int) -> Tensor:
    """[..., k, n, b] → [..., n, d]: the inverse of :func:`to_blocks`."""
    if x.shape[-3] == 1:
        return x.squeeze(-3)
    return x.transpose(-2, -3).flatten(-2)[..., :columns]


def apply_right(x: Tensor, blocks: Tensor) -> Tensor:
    """x · blockdiag(blocks): x [..., n, d], blocks [..., k, b, b] → [..., n, d]."""
    k, b = blocks.shape[-3], blocks.shape[-1]
    return from_blocks(to_blocks(x, k, b) @ blocks, x.shape[-1])


def apply_left(blocks: Tensor, x: Tensor) -> Tensor:
    """blockdiag(blocks) · x: blocks [..., k, b, b], x [..., n, d] → [..., n, d]."""
    k, b = blocks.shape[-3], blocks.shape[-1]
    if k == 1:
        return blocks.squeeze(-3) @ x
    rows = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, k * b - rows))
    return (blocks @ padded.unflatten(-2, (k, b))).flatten(-3, -2)[..., :rows, :].contiguous()


def input_statistic(a: Tensor, weight: Tensor | None, k: int, b: int) -> Tensor:
    """S = Σ_t w_t a_t a_tᵀ (Eq. 4 before the mean): a [..., N, d], w_t [..., N] or [N] → [..., k, b, b].

    w_t is ‖g_t‖², or the mask where φ' = 1.
    """
    blocks = to_blocks(a, k, b)
    weighted = blocks if weight is None else blocks * weight[..., None, :, None]
    return weighted.mT @ blocks


def output_statistic(a: Tensor, g2: Tensor) -> Tensor:
    """v = Σ_t ‖a_t‖² g_t² (numerator of Eq. 5): a [..., N, d], g2 [..., N, m] (zero where masked) → [..., m]."""
    return (a.square().sum(-1).unsqueeze(-2) @ g2).squeeze(-2)


def trace(blocks: Tensor) -> Tensor:
    """tr Φ over all blocks: [..., k, b, b] → [...]."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1))


def running_average(old: Tensor, new: Tensor, old_weight: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Eq. 14, ``ε·old + (1 − ε)·new``, for G factors at once, with the start-up bias kept track of.

    Args:
        old, new: [G, ...]; a `new` with any non-finite entry is passed over.
        old_weight: [G], the sum of the weights in `old` so far: the unbiased factor is ``old / old_weight``.

    Returns:
        The new average, its weight [G].
    """
    valid = torch.isfinite(new.flatten(1)).all(1)
    shape = (-1,) + (1,) * (new.dim() - 1)
    average = torch.where(valid.view(shape), old * decay + new * (1 - decay), old)
    return average, torch.where(valid, old_weight * decay + (1 - decay), old_weight)


def damping(
    mean_eigenvalue: Tensor, kind: str, rho: float, least: float, most: float, scale: Tensor | float = 1.0
) -> Tensor:
    """λ from tr/dim: ``relative`` ρ·tr/dim; ``paper`` clamp(tr/dim, ν1, ν2).

    Args:
        mean_eigenvalue: tr Φ/d of what is kept; `scale` is the factor (m where φ' = 1) that makes it the paper's Φ.
    """
    if kind == "relative":
        return rho * mean_eigenvalue
    return (mean_eigenvalue * scale).clamp(least, most) / scale


def add_damping(blocks: Tensor, lam: Tensor) -> Tensor:
    """Φ + λI: blocks [..., b, b], lam of the leading shape. Returns a new tensor, symmetric to the last bit."""
    damped = (blocks + blocks.mT) * 0.5
    damped.diagonal(dim1=-2, dim2=-1).add_(lam.unsqueeze(-1))
    return damped


def psi_inverse(psi: Tensor, kind: str, rho: float, least: float, most: float) -> Tensor:
    """(Ψ + λ_Ψ)⁻¹ of a diagonal Ψ: [..., m] → [..., m]. λ_Ψ from tr Ψ/m as for Φ."""
    return 1.0 / (psi + damping(psi.mean(-1), kind, rho, least, most).unsqueeze(-1))


# The quintics diverge above 1, where rounding in half precision lifts values: all but the last are of x / 1.01.
_SAFETY = 1.01
QUINTICS = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in POLAR_EXPRESS[:4]] + [POLAR_EXPRESS[4]]


def orthogonalize(x: Tensor) -> Tensor:
    """≈ U Vᵀ of X = U S Vᵀ by Newton-Schulz iterations with Polar Express's coefficients: [L, m, n] → [L, m, n].

    Singular values above 1e-3 of the norm of X end in about 0.87 … 1.13; a single row or column is normalised exactly.
    Fewer iterations, which lift less of the small ones, cost a ViT a tenth of a nat.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # in float64: squares of small entries would vanish
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    x = x / norm.clamp_min(torch.finfo(x.dtype).tiny).to(x.dtype)
    if x.shape[-2] > 1:
        for a, b, c in QUINTICS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normalized(matrix: Tensor) -> Tensor:
    """C·dim/tr C: mean eigenvalue 1, zero where the trace is: [..., n, n]."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return matrix / mean.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]


def rms_rate(direction: Tensor, scale: float) -> Tensor:
    """α = κ / RMS(D): [..., m, d] → [...]; 0 where D is 0."""
    rms = torch.linalg.vector_norm(direction, dim=(-2, -1)) / (direction.shape[-2] * direction.shape[-1]) ** 0.5
    return torch.where(rms > 0, scale / rms, torch.zeros_like(rms))


def quadratic_form(direction: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
    """⟨Ψ D Φ, D⟩: direction [..., m, d], phi [..., k, b, b], psi [..., m] → [...]."""
    return (apply_right(direction, phi) * direction * psi.unsqueeze(-1)).sum((-2, -1)).clamp_min(0)


def trust_rate(form: Tensor, scale: float) -> Tensor:
    """α = κ / sqrt⟨Ψ D Φ, D⟩, a bound on the Gaussian KL of the layer's own predictive distribution; 0 for 0."""
    return torch.where(form > 0, scale / form.sqrt(), torch.zeros_like(form))


def adaptive_rate(slope: Tensor, curvature: Tensor, mu: float) -> Tensor:
    """Eq. 12-13: α = ⟨D, M⟩₊ / (DᵀFD + μ); 0 where a sample's gradient is not finite."""
    return torch.where(torch.isfinite(curvature), slope.clamp_min(0) / (curvature + mu), 0.0)
