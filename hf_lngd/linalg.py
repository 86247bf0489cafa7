"""Functions on tensors, torch alone. N tokens or locations, d inputs of a layer (the bias in the factor is a last one,
of ones), m outputs. Φ is kept as k equal diagonal blocks of size b with k·b ≥ d: columns past d are zero. A leading
``...`` is any number of batch dimensions. Equation numbers are those of Liu et al., NeurIPS 2024."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .torch_internals import cpu_capabilities


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


def row_blocks(x: Tensor, k: int, b: int) -> Tensor:
    """[..., n, d] → [..., k, b, d]: rows cut into blocks, zeros after the last."""
    missing = k * b - x.shape[-2]
    return (pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (k, b))


def apply_left(blocks: Tensor, x: Tensor) -> Tensor:
    """blockdiag(blocks) · x: blocks [..., k, b, b], x [..., n, d] → [..., n, d]."""
    k, b, rows = blocks.shape[-3], blocks.shape[-1], x.shape[-2]
    if k == 1:
        return blocks.squeeze(-3) @ x
    found = (blocks @ row_blocks(x, k, b)).flatten(-3, -2)
    return found if found.shape[-2] == rows else found[..., :rows, :].contiguous()


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


# Polar Express (Amsel, Persson, Musco, Gower 2025): the minimax quintic of each step for singular values in [0.05, 1].
# Quintics diverge above 1, where rounding lifts values: the first is of x / 1.01.
_SAFETY = 1.01
QUINTICS = (
    (6.68552007671117 / _SAFETY, -17.8112697677008 / _SAFETY**3, 12.6195413037955 / _SAFETY**5),
    (2.51273712828626, -1.81954295890403, 0.419863121622494),
    (1.92697853828797, -1.3066162336211, 0.380705135148909),
)


def polar_root(gram: Tensor) -> Tensor:
    """≈ (XXᵀ)^(-½) of R = XXᵀ, with which PX is the polar factor of X: [L, m, m] → the same, by three of Polar
    Express's quintics.

    X is divided by a bound of its largest singular value, ‖R²‖^¼, which is twice as large for 256 alike. Values above
    0.05 of that end in 0.99 … 1.01, smaller ones at up to 32 times what they were. Each quintic is X ← ZX with Z = aI +
    bR + cR²; R and the product of the Zs are iterated (https://github.com/Dao-AILab/gram-newton-schulz)."""
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram / size
    if gram.shape[-1] == 1:
        return gram * size.rsqrt()
    z = gram @ gram
    bound = torch.linalg.vector_norm(z, dim=(-2, -1), keepdim=True).sqrt()
    bound = bound.clamp_min(1 / gram.shape[-1])  # what it is at the least, but of zeros
    gram, z = gram / bound, z / bound.square()
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(QUINTICS):
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if i else z.mul_(c).add_(gram, alpha=b)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        product = z if product is None else product @ z
        if i + 1 < len(QUINTICS):
            gram = z @ gram @ z
    assert product is not None
    return product * (bound * size).rsqrt()


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
    mean_eigenvalue: Tensor, rho: float | str, bounds: tuple[float, float], scale: Tensor | float = 1.0
) -> Tensor:
    """λ from tr/dim of what is kept: ρ·tr/dim, or of ``paper`` clamp(tr/dim, ν1, ν2) of `scale` times it, which is the
    paper's Φ."""
    return (mean_eigenvalue * scale).clamp(*bounds) / scale if isinstance(rho, str) else rho * mean_eigenvalue


def add_damping(blocks: Tensor, lam: Tensor) -> Tensor:
    """Φ + λI: blocks [..., b, b], lam of the leading shape. Returns a new tensor, symmetric to the last bit."""
    damped = (blocks + blocks.mT) * 0.5
    damped.diagonal(dim1=-2, dim2=-1).add_(lam.unsqueeze(-1))
    return damped


def rms_rate(norms: Tensor, numel: int, scale: float) -> Tensor:
    """α = κ / RMS(D) from the norms ‖D‖ [...] of tensors of `numel` entries; 0 where D is 0."""
    return (scale * numel**0.5 / norms).nan_to_num(posinf=0.0)


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """‖t‖² of each, [n] in at least float32 (in half precision it would overflow), on the device of the first."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square()


# Any of these instructions makes matmuls in bfloat16 faster than in float32. Without one they are emulated: four times
# as slow on a CPU that has AVX-512 alone.
_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device has instructions for matmuls in bfloat16; of CUDA's those from Ampere on."""
    if device.type == "cpu":
        capabilities = cpu_capabilities()
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
