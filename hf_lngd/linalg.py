"""Functions on tensors, torch alone. N tokens or locations, d inputs of a layer (the bias in the factor is a last one,
of ones), m outputs. Φ is kept as k equal diagonal blocks of size b with k·b ≥ d: columns past d are zero. A leading
``...`` is any number of batch dimensions. Equation numbers are those of Liu et al., NeurIPS 2024."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_layout(columns: int, limit: int) -> tuple[int, int]:
    """(k, b): how Φ of this many columns is cut so that no block is wider than `limit`. k = 1 leaves it whole."""
    k = -(-columns // limit)
    return k, -(-columns // k)


def to_blocks(x: Tensor, k: int, b: int) -> Tensor:
    """[..., n, d] → [..., k, n, b]: columns cut into blocks, zeros after the last."""
    if k == 1:
        return x.unsqueeze(-3)
    if (missing := k * b - x.shape[-1]) > 0:
        x = pad(x, (0, missing))
    return x.unflatten(-1, (k, b)).transpose(-2, -3)


def from_blocks(x: Tensor, columns: int) -> Tensor:
    """[..., k, n, b] → [..., n, d]: the inverse of :func:`to_blocks`."""
    return x.squeeze(-3) if x.shape[-3] == 1 else x.transpose(-2, -3).flatten(-2)[..., :columns]


def apply_right(x: Tensor, blocks: Tensor) -> Tensor:
    """x · blockdiag(blocks): x [..., n, d], blocks [..., k, b, b] → [..., n, d]."""
    return from_blocks(to_blocks(x, blocks.shape[-3], blocks.shape[-1]) @ blocks, x.shape[-1])


def apply_left(blocks: Tensor, x: Tensor) -> Tensor:
    """blockdiag(blocks) · x: blocks [..., k, b, b], x [..., n, d] → [..., n, d]."""
    k, b, rows = blocks.shape[-3], blocks.shape[-1], x.shape[-2]
    if k == 1:
        return blocks.squeeze(-3) @ x
    cut = pad(x, (0, 0, 0, k * b - rows)).unflatten(-2, (k, b))
    return (blocks @ cut).flatten(-3, -2)[..., :rows, :].contiguous()


def trace(blocks: Tensor) -> Tensor:
    """tr Φ over all blocks: [..., k, b, b] → [...]."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1))


def input_statistic(a: Tensor, weight: Tensor | None, k: int, b: int) -> Tensor:
    """S = Σ_t w_t a_t a_tᵀ (Eq. 4 before the mean): a [..., N, d]; w_t [..., N] or [N], ‖g_t‖² or the mask → [..., k,
    b, b]."""
    blocks = to_blocks(a, k, b)
    weighted = blocks if weight is None else blocks * weight[..., None, :, None]
    return weighted.mT @ blocks


def packed_shape(n: int) -> tuple[int, int]:
    """Shape in which `pack` keeps a symmetric n × n matrix."""
    half = -(-n // 2)
    return 2 * half + 1, half


def pack(matrix: Tensor) -> Tensor:
    """Symmetric [..., n, n] → rectangular full packed form, exact, half the memory (odd n: one zero row more).

    With A = [[A₁₁, A₂₁ᵀ], [A₂₁, A₂₂]] the rectangle holds the lower triangle of the left half columns, one row
    down, and the upper triangle of A₂₂ in the place that this leaves (Gustavson et al. 2010, LAPACK's RFP)."""
    if matrix.shape[-1] % 2:
        matrix = pad(matrix, (0, 1, 0, 1))
    half = matrix.shape[-1] // 2
    packed = pad(matrix[..., :half], (0, 0, 1, 0))
    upper = _upper(half, matrix.device)
    packed[..., :half, :] = torch.where(upper, matrix[..., half:, half:], packed[..., :half, :])
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The symmetric [..., n, n] that `pack` was given."""
    half = packed.shape[-1]
    full = packed.new_empty(*packed.shape[:-2], 2 * half, 2 * half)
    upper = _upper(half, packed.device)
    first, second, below = packed[..., 1 : half + 1, :], packed[..., :half, :], packed[..., half + 1 :, :]
    full[..., :half, :half] = torch.where(upper, first.mT, first)
    full[..., half:, half:] = torch.where(upper, second, second.mT)
    full[..., half:, :half], full[..., :half, half:] = below, below.mT
    return full[..., :n, :n]


def _upper(n: int, device: torch.device) -> Tensor:
    """[n, n], True on and above the diagonal."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu()


def inverse(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverses of positive definite matrices [..., n, n] by Cholesky; ok [...] (False: not to be used); condition
    [...], a lower bound, of the diagonal of the Cholesky factor.

    A matrix that fails in its own precision is tried again in float64: on the CPU those that need it, on an accelerator
    all of them at once, since to ask which would wait for the device."""
    return _from_cholesky(matrix, torch.cholesky_inverse)


def whitener(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V = L⁻¹ of A = L Lᵀ, lower triangular: VᵀV = A⁻¹, so rows g become g Vᵀ of unit covariance. The rest as of
    `inverse`.

    A fraction of the cost of A^(-1/2), and as good where only VᵀV matters: the two differ by a rotation."""
    return _from_cholesky(matrix, lambda factor: torch.linalg.solve_triangular(factor, eye_like(factor), upper=False))


def _from_cholesky(matrix: Tensor, solve: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    on_cpu = matrix.device.type == "cpu"
    result, ok, condition = _cholesky(matrix if on_cpu else matrix.double(), matrix.dtype, solve)
    if on_cpu and matrix.dtype != torch.float64 and not bool(ok.all()):
        bad = ~ok
        result[bad], ok[bad], condition[bad] = _cholesky(matrix[bad].double(), matrix.dtype, solve)
    return result, ok, condition


def _cholesky(matrix: Tensor, dtype: torch.dtype, solve: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite = (info == 0) & torch.isfinite(factor.sum((-2, -1)))
    # cholesky_inverse raises for the whole batch if one factor is unusable
    factor = torch.where(finite[..., None, None], factor, eye_like(factor))
    result, diagonal = solve(factor).to(dtype), factor.diagonal(dim1=-2, dim2=-1)
    ok = finite & torch.isfinite(result.sum((-2, -1)))
    return result, ok, (diagonal.amax(-1) / diagonal.amin(-1)).square().to(dtype)


def eye_like(matrix: Tensor) -> Tensor:
    """The identity of the size, dtype and device of [..., n, n]: [n, n]."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


# Polar Express (Amsel, Persson, Musco, Gower 2025): the minimax quintic of each step for singular values in [1e-3, 1].
# The quintics diverge above 1, where rounding in half precision lifts values: all but the last are of x / 1.01.
_SAFETY = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
QUINTICS = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:4]] + [_POLAR_EXPRESS[4]]


def orthogonalize(x: Tensor) -> Tensor:
    """≈ U Vᵀ of X = U S Vᵀ by Newton-Schulz iterations with Polar Express's coefficients: [L, m, n] → [L, m, n].

    Singular values above 1e-3 of the norm of X end in about 0.87 … 1.13; a single row or column is normalised exactly.
    Fewer iterations, which lift less of the small ones, cost a ViT a tenth of a nat."""
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


def running_average(old: Tensor, new: Tensor, old_weight: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Eq. 14, ``ε·old + (1 − ε)·new``, for G factors [G, ...] at once, and the new sum of weights [G] of each.

    A `new` with any non-finite entry is passed over. The factor without start-up bias is ``old / old_weight``."""
    valid = torch.isfinite(new.flatten(1)).all(1)
    average = torch.where(along(valid, new), old * decay + new * (1 - decay), old)
    return average, torch.where(valid, old_weight * decay + (1 - decay), old_weight)


def along(flags: Tensor, value: Tensor) -> Tensor:
    """[G] in a shape that broadcasts with a value [G, ...]."""
    return flags.view(-1, *[1] * (value.dim() - 1))


def damping(
    mean_eigenvalue: Tensor, kind: str, rho: float, bounds: tuple[float, float], scale: Tensor | float = 1.0
) -> Tensor:
    """λ from tr/dim of what is kept: ``relative`` ρ·tr/dim; ``paper`` clamp(tr/dim, ν1, ν2) of `scale` times it, which
    is the paper's Φ."""
    return rho * mean_eigenvalue if kind == "relative" else (mean_eigenvalue * scale).clamp(*bounds) / scale


def add_damping(blocks: Tensor, lam: Tensor) -> Tensor:
    """Φ + λI: blocks [..., b, b], lam of the leading shape. Returns a new tensor, symmetric to the last bit."""
    damped = (blocks + blocks.mT) * 0.5
    damped.diagonal(dim1=-2, dim2=-1).add_(lam.unsqueeze(-1))
    return damped


def rms_rate(norms: Tensor, numel: int, scale: float) -> Tensor:
    """α = κ / RMS(D) from the norms ‖D‖ [...] of tensors of `numel` entries; 0 where D is 0."""
    rms = norms / numel**0.5
    return torch.where(rms > 0, scale / rms, 0.0)


# Any of these instructions makes matmuls in bfloat16 faster than in float32. Without one they are emulated: four times
# as slow on a CPU that has AVX-512 alone.
_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device has instructions for matmuls in bfloat16; of CUDA's those from Ampere on."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in _CPU_INSTRUCTIONS)
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a step's matmuls where the state has this one: bfloat16, as in torch.optim.Muon, if it is fast."""
    return kept_dtype(dtype) if fast_bfloat16(device) else dtype


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which whiteners are kept for those matmuls. Not a matter of the device: a checkpoint of one machine
    is another's, too. float64 models are float64 throughout."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


@lru_cache
def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state of weights of this one: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@lru_cache(maxsize=4096)
def index_tensor(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices on a device. Cached: to copy a list there waits for the device, and the same ones come again."""
    return torch.tensor(rows, dtype=torch.int64, device=device)
