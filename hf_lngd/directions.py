"""Where a layer's step goes, and how far: one object a direction. The paper's own is in `paper.natural`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import LNGDConfig
from .factors import Bank
from .layers import Layer
from .linalg import along, apply_right, matmul_dtype, orthogonalize, rms_rate


@dataclass
class Inputs:
    """What a direction is computed of, for n layers of one shape in one batch.

    Attributes:
        gradient: [n · units, m, columns], the averaged gradient, in the state's dtype.
        bank: their factors, and `rows` [n · units] of it.
        state: the direction's own, of these layers: name → [n · units, …], to be updated in place.
        lr, beta2: effective rate and decay of the row scale, numbers or [n]."""

    gradient: Tensor
    layers: list[Layer]
    bank: Bank
    rows: Tensor
    state: Mapping[str, Tensor]
    lr: float | Tensor
    beta2: float | Tensor

    @property
    def units(self) -> int:
        """Matrices a layer."""
        return self.layers[0].units


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

    def factors(self, layer: Layer, bank: Bank, rows: Tensor) -> dict[str, Tensor]:
        """The factors of a layer as its method defines them, [units, …] each, see `LNGD.factors`."""

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """What is subtracted from the weights, lr · α_l · D [n · units, m, columns], and α_l [n]. Or D and None: its
        rate is another's to say."""


class Polar:
    """D = polar(M Vᵀ) V with VᵀV = Φ̂⁻¹: the momentum orthogonalised where the layer's inputs are white. Each row is
    divided by the root of its running mean square (Li et al. 2025, NorMuon: a Ψ estimated from updates), and the whole
    scaled to root mean square lr · κ.

    Any V with VᵀV = Φ̂⁻¹ does: the polar factor of M Vᵀ turns with V, and the last product turns it back."""

    factor = "whitener"

    def __init__(self, config: LNGDConfig) -> None:
        self._rate, self._scale = config.rate, config.rate_scale

    def new_state(self, layer: Layer) -> dict[str, Tensor]:
        """``row_square`` [units, m]: the running mean square of each row of D."""
        return {"row_square": layer.like.new_zeros(layer.units, layer.m)}

    def factors(self, layer: Layer, bank: Bank, rows: Tensor) -> dict[str, Tensor]:
        """Φ = m · E[a aᵀ], and Ψ = 1/m throughout."""
        phi = bank.dense(rows)["phi"] * layer.m
        return {"phi": phi, "psi": phi.new_full((len(phi), layer.m), 1.0 / layer.m)}

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        grad = x.gradient
        dtype = matmul_dtype(grad.dtype, grad.device)
        v = x.bank.whitener(x.rows, dtype)  # type: ignore[attr-defined]
        white = apply_right(grad.to(dtype), v.mT)
        direction = apply_right(orthogonalize(white), v).to(grad.dtype)
        sizes = torch.linalg.vector_norm(direction, dim=-1) / direction.shape[-1] ** 0.5
        scale = self._row_scale(sizes, x)
        rate: Tensor | None = None
        if self._rate == "rms":  # which needs but the rows' sizes: one pass over D is enough
            sizes = (sizes * scale).view(len(x.layers), -1)
            rate = rms_rate(torch.linalg.vector_norm(sizes, dim=-1), sizes.shape[1], self._scale)
        elif self._rate == "none":
            rate = sizes.new_ones(len(x.layers))
        if rate is not None:
            scale = scale * of_units(rate * x.lr, x.units)[:, None]
        return direction.mul_(scale.unsqueeze(-1)), rate

    def _row_scale(self, sizes: Tensor, x: Inputs) -> Tensor:
        """One over the root of the running mean square of each row; its start-up bias cancels in the layer's rate.
        sizes: the rows' root mean squares, [n · units, m] → the same."""
        decay = of_units(x.beta2, x.units)
        new = along(1 - decay, sizes) if isinstance(decay, Tensor) else 1 - decay
        average = x.state["row_square"].lerp_(sizes.square(), new)
        return (average + torch.finfo(average.dtype).tiny).rsqrt()
