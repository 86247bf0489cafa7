"""Where a layer's step goes, and how far: one object a direction. The paper's own is in `paper.natural`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import LNGDConfig
from .factors import Bank, block_diagonal
from .layers import Layer, output_blocks
from .linalg import (
    add_damping,
    along,
    apply_left,
    apply_right,
    kept_dtype,
    matmul_dtype,
    pack,
    packed_shape,
    polar_root,
    rms_rate,
    row_blocks,
    trace,
    unpack,
    whitener,
)

# Ψ of `Polar`: decay of its running average, steps between two updates (see `psi_interval`), and its damping.
PSI_DECAY, PSI_INTERVAL, PSI_DAMPING = 0.9, 5, 0.3
# Steps are enlarged by up to MOST_GAIN as long as GAIN_STEPS more of them, at the schedule's highest rate, leave a
# layer's path within this share of the size that its weights began with.
MOST_GAIN, GAIN_STEPS, GAIN_REACH = 10.0, 20, 0.3


@dataclass
class Inputs:
    """What a direction is computed of, for n layers of one shape in one batch.

    Attributes:
        gradient: [n · units, m, columns], the averaged gradient, in the state's dtype.
        bank: their factors, and `rows` [n · units] of it.
        state: the direction's own, of these layers: name → [n · units, …], to be updated in place.
        step, psi_interval: updates of these layers before this one, and between two of their Ψ.
        lr, peak_lr, beta2: effective rate, its schedule's highest, and decay of the row scale, numbers or [n].
        first_rms: [n], root mean square of the weights when training began; 0: not known."""

    gradient: Tensor
    layers: list[Layer]
    bank: Bank
    rows: Tensor
    state: Mapping[str, Tensor]
    step: int
    psi_interval: int
    lr: float | Tensor
    peak_lr: float | Tensor
    beta2: float | Tensor
    first_rms: Tensor

    @property
    def units(self) -> int:
        """Matrices a layer."""
        return self.layers[0].units


def psi_interval(interval: int) -> int:
    """Updates of a layer between two of its Ψ, where there are `interval` steps between two updates."""
    return max(1, PSI_INTERVAL // interval)


def of_units(value: Tensor | float, units: int) -> Any:
    """A value of n layers, a number or [n], as one of their matrices, a number or [n · units]."""
    return value.repeat_interleave(units) if isinstance(value, Tensor) and value.dim() else value


class Direction(Protocol):
    """A direction of the matrices of layers.

    Attributes:
        factor: what it takes of Φ: ``whitener`` or ``inverse``."""

    factor: str

    def new_state(self, layer: Layer) -> dict[str, Tensor]:
        """What it keeps of a layer between steps, each [units, …], before the first one."""

    def factors(self, layer: Layer, bank: Bank, rows: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of a layer as its method defines them, [units, …] each, see `LNGD.factors`. `state`: its own of
        this layer."""

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """What is subtracted from the weights, lr · α_l · D [n · units, m, columns], and α_l [n]. Or D and None: its
        rate is another's to say."""


class Polar:
    """D = Uᵀ polar(U M Vᵀ) V with VᵀV = Φ̂⁻¹ and UᵀU = Ψ̂⁻¹: the momentum orthogonalised where the layer's inputs and its
    gradients are white; in an attention head by head (blocks of rows).

    Ψ ← β Ψ + (1 − β) M Φ̂⁻¹ Mᵀ / tr, about every `PSI_INTERVAL` steps: given Φ the factor that minimises the KL
    divergence of Gaussians (Lin et al. 2025, arXiv:2509.03378), of the momentum in place of the gradient; it is damped
    by λ = `PSI_DAMPING` tr Ψ / m, and cut into diagonal blocks as Φ is, or one a head. Each row of D is divided by the
    root of its running mean square (Li et al. 2025, NorMuon), and the whole scaled to root mean square lr · κ · s.

    s is 1 but at learning rates so low that the weights hardly move. A step of signs of the same size, as AdamW's are
    at first, lowers the loss to first order r = ‖M‖₁ / ⟨M, D⟩ times as much (RMS(D) = 1; 2 to 10 where gradients have
    low rank, near 1 where they are noise), so s = min(r, (c RMS(W₀) − p) / (20 lr κ)), between 1 and 10, with the
    schedule's highest lr, where p is the sum of the layer's steps so far: what it may still go, over 20 steps.

    Any U and V of these products do: polar(U M Vᵀ) turns with them, and the outer products turn it back."""

    factor = "whitener"

    def __init__(self, config: LNGDConfig) -> None:
        self._rate, self._scale = config.rate, config.rate_scale
        self._limit, self._whiten = config.max_factor_dim, config.whiten

    def new_state(self, layer: Layer) -> dict[str, Tensor]:
        """``row_square`` [units, m]: the running mean square of each row of D; ``psi_blocks`` [units, k, …], packed,
        and ``psi_whitener`` [units, k, b, b]: Ψ and U; ``gain`` and ``path`` [units]: s and p, the layer's."""
        found = {"row_square": layer.like.new_zeros(layer.units, layer.m)}
        if self._rate == "rms":
            found |= {"gain": layer.like.new_ones(layer.units), "path": layer.like.new_zeros(layer.units)}
        if self._whiten == "both":
            k, b = output_blocks(layer, self._limit)
            eye = torch.eye(b, dtype=kept_dtype(layer.like.dtype), device=layer.like.device)
            found["psi_blocks"] = layer.like.new_zeros(layer.units, k, *packed_shape(b))
            found["psi_whitener"] = eye.repeat(layer.units, k, 1, 1)
        return found

    def factors(self, layer: Layer, bank: Bank, rows: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Φ = m · E[a aᵀ], and Ψ of trace 1, I/m where there is none."""
        phi = bank.dense(rows)["phi"] * layer.m
        eye = torch.eye(layer.m, dtype=phi.dtype, device=phi.device)
        if "psi_blocks" not in state:
            return {"phi": phi, "psi": (eye / layer.m).expand(len(phi), -1, -1)}
        blocks = unpack(state["psi_blocks"], output_blocks(layer, self._limit)[1])
        sums = along(trace(blocks), eye.expand(len(phi), -1, -1))
        return {"phi": phi, "psi": torch.where(sums > 0, block_diagonal(blocks, layer.m) / sums, eye / layer.m)}

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        direction = self._direction(x).to(x.gradient.dtype)
        sizes = torch.linalg.vector_norm(direction, dim=-1) / direction.shape[-1] ** 0.5
        scale = self._row_scale(sizes, x)
        if self._rate == "adaptive":
            return direction.mul_(scale.unsqueeze(-1)), None
        if self._rate == "rms":  # which needs but the rows' sizes: one pass over D is enough
            sizes = (sizes * scale).view(len(x.layers), -1)
            rate = rms_rate(torch.linalg.vector_norm(sizes, dim=-1), sizes.shape[1], self._scale)
            if x.step % x.psi_interval == 0:
                self._update_gain(direction, scale * of_units(rate / self._scale, x.units)[:, None], x)
            rate = rate * x.state["gain"].view(len(x.layers), -1)[:, 0]
        else:
            rate = sizes.new_ones(len(x.layers))
        scale = scale * of_units(rate * x.lr, x.units)[:, None]
        return direction.mul_(scale.unsqueeze(-1)), rate

    def _update_gain(self, direction: Tensor, scale: Tensor, x: Inputs) -> None:
        """s of the coming steps until the next update, and p after them. scale: [n · units, m], which makes the rows of
        D of root mean square 1."""
        n = len(x.layers)
        signs = x.gradient.abs().sum((-2, -1)).view(n, -1).sum(1)
        own = ((x.gradient * direction).sum(-1) * scale).sum(-1).view(n, -1).sum(1)
        ratio = (signs / own).nan_to_num(nan=1.0).clamp(1, MOST_GAIN)
        gain, path = (x.state[key].view(n, -1) for key in ("gain", "path"))
        most = (GAIN_REACH * x.first_rms - path[:, 0]) / (GAIN_STEPS * x.peak_lr * self._scale)
        most = most.nan_to_num(nan=1.0).clamp_min(1)  # 0 / 0: weights that began with zeros, and a rate of 0
        gain.copy_(torch.minimum(ratio, most).unsqueeze(-1))
        path += (x.psi_interval * x.lr * self._scale * gain[:, 0]).unsqueeze(-1)

    def _row_scale(self, sizes: Tensor, x: Inputs) -> Tensor:
        """One over the root of the running mean square of each row; its start-up bias cancels in the layer's rate.
        sizes: the rows' root mean squares, [n · units, m] → the same."""
        decay = of_units(x.beta2, x.units)
        new = along(1 - decay, sizes) if isinstance(decay, Tensor) else 1 - decay
        average = x.state["row_square"].lerp_(sizes.square(), new)
        return (average + torch.finfo(average.dtype).tiny).rsqrt()

    def _direction(self, x: Inputs) -> Tensor:
        """D. Of X = U M Vᵀ only the Gram matrix of the short side is iterated: for wide matrices W = M Vᵀ, R = U WWᵀ Uᵀ
        and D = (Uᵀ R^(-½) U) W V; for tall ones W = U M, R = V WᵀW Vᵀ and D = Uᵀ W (Vᵀ R^(-½) V)."""
        heads, (_, m, columns) = x.layers[0].heads, x.gradient.shape
        dtype = matmul_dtype(x.gradient.dtype, x.gradient.device)
        grad = x.gradient.to(dtype)
        v = None if self._whiten == "none" else x.bank.whitener(x.rows, dtype)  # type: ignore[attr-defined]
        tall, updates_psi = m > columns and heads == 1, self._whiten == "both" and x.step % x.psi_interval == 0
        white = grad
        if v is not None and (updates_psi or not tall):
            white = apply_right(grad, v.mT)
        if updates_psi:
            self._update_psi(white, x)
        u = x.state["psi_whitener"].to(dtype) if self._whiten == "both" else None
        if tall:
            w = grad if u is None else apply_left(u, grad)
            direction = w @ _root(w.mT @ w, v)
            return direction if u is None else apply_left(u.mT, direction)
        w = white.view(-1, m // heads, columns)
        u = u if u is None or heads == 1 else u.flatten(0, 1).unsqueeze(1)
        direction = (_root(w @ w.mT, u) @ w).view(grad.shape)
        return direction if v is None else apply_right(direction, v)

    def _update_psi(self, white: Tensor, x: Inputs) -> None:
        """Take M Vᵀ [n · units, m, columns] into Ψ, and derive U."""
        psi, (k, b) = x.state["psi_blocks"], output_blocks(x.layers[0], self._limit)
        rows = row_blocks(white, k, b)
        new = (rows @ rows.mT).to(psi.dtype)
        tiny = torch.finfo(psi.dtype).tiny
        new /= along(trace(new).clamp_min(tiny), new)
        psi.lerp_(pack(new), 1 - PSI_DECAY)  # its start-up bias cancels below
        average = unpack(psi, b)
        average /= along((trace(average) / white.shape[1]).clamp_min(tiny), average)
        value, ok, _ = whitener(add_damping(average, average.new_full(average.shape[:2], PSI_DAMPING)))
        u = x.state["psi_whitener"]
        u.copy_(torch.where(along(ok.all(1), u), value.to(u.dtype), u))


def _root(gram: Tensor, factor: Tensor | None) -> Tensor:
    """Sᵀ (S R Sᵀ)^(-½) S of R [..., m, m] and S = blockdiag(factor [..., k, b, b])."""
    if factor is None:
        return polar_root(gram)
    root = polar_root(apply_right(apply_left(factor, gram), factor.mT))
    return apply_right(apply_left(factor.mT, root), factor)
