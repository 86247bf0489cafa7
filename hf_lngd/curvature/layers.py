"""Which modules LNGD can own, and the tensors of one call of them in a canonical form.

A layer is one weight: a matrix, or for a grouped convolution one matrix a group (its units). Two modules that share
it (tied) are one layer, whose statistics are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .factors import block_layout
from .patches import Window, chunks

# Below this width a whole Φ costs next to nothing, so `max_factor_dim="auto"` does not cut further.
_SMALLEST_BLOCK = 64
LEFT, RIGHT = "left", "right"  # of a weight matrix: the side of its outputs, that of its inputs
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Geometry:
    """How a module's weight and input become matrices.

    Attributes:
        kind: ``linear`` (weight [m, d]), ``transposed`` (transformers' Conv1D: weight [d, m]), ``convolution``.
        units: matrices in the weight: groups of a convolution, else 1.
        out_features: m of each.
        in_features: d of each: channels of a group times kernel.
        window: of a convolution.
    """

    kind: str
    units: int
    out_features: int
    in_features: int
    window: Window | None = None

    def reads_like(self, other: Geometry) -> bool:
        """Both make the same rows of the same input."""
        return (self.units, self.in_features, self.window) == (other.units, other.in_features, other.window)


# Types that users added, see `add_layer_type`.
_OWN_TYPES: dict[type[nn.Module], Callable[[Any], Geometry | None]] = {}


def add_layer_type(kind: type[nn.Module], look: Callable[[Any], Geometry | None] | None) -> None:
    """Let LNGD own modules of a type of your own, in optimizers that are made afterwards (see docs/extending.md).

    Args:
        kind: the type itself; its subclasses may compute something else and do not count.
        look: a module → its geometry, ``linear`` or ``transposed``; None for a module that stays AdamW's. The module
            is called with one tensor a [..., d] and gives W a + b, [..., m]: `weight` is W in a shape that can be
            viewed as [m, d] (``transposed``: as [d, m], of two dimensions), `bias` is [m] or there is none. None in
            the place of the function takes the type out again.
    """
    if look is None:
        _OWN_TYPES.pop(kind, None)
    else:
        _OWN_TYPES[kind] = look


def _own_geometry(module: nn.Module, weight: Tensor) -> Geometry | None:
    """What a user's function says of a module, checked.

    Raises:
        ValueError: it does not fit the weight or the bias.
    """
    found = _OWN_TYPES[type(module)](module)
    if found is None:
        return None
    m, d = found.out_features, found.in_features
    shape, bias = list(weight.shape), module._parameters.get("bias")
    fits = m * d == weight.numel() and found.units == 1 and (found.kind == "linear" or shape == [d, m])
    if found.kind not in ("linear", "transposed") or not fits or (bias is not None and list(bias.shape) != [m]):
        raise ValueError(
            f"add_layer_type: {type(module).__name__}: got {found.kind} [{m}, {d}] for a weight {shape}"
            f"{'' if bias is None else f' and a bias {list(bias.shape)}'}, accepted: linear or transposed, m·d "
            "numbers, one unit, a bias [m]"
        )
    return found


def geometry_of(module: nn.Module) -> Geometry | None:
    """The geometry of a module that LNGD can own: its forward is torch's own, with a plain weight, or its type was
    added by :func:`add_layer_type`; else None."""
    weight: Any = module._parameters.get("weight")  # a parametrization would have taken it away
    if weight is None:
        return None
    if type(module) in _OWN_TYPES:
        return _own_geometry(module, weight)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return Geometry("linear", 1, *weight.shape)
    for kind in _CONVOLUTIONS:
        plain = isinstance(module, kind) and type(module).forward is kind.forward
        if plain and type(module)._conv_forward is kind._conv_forward:  # type: ignore[attr-defined]
            units = int(module.groups)  # type: ignore[arg-type]
            window = Window.of(module)  # type: ignore[arg-type]
            return Geometry("convolution", units, weight.shape[0] // units, weight[0].numel(), window)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return Geometry("transposed", 1, weight.shape[1], weight.shape[0])
    return None


@dataclass
class Layer:
    """A linear map owned by LNGD: `units` matrices [m, d]; with `bias_name` the bias is column d + 1 of the factor.

    `sharded`: the parameters ``weight`` and ``bias`` where FSDP2 has sharded them.
    """

    name: str
    weight_name: str
    bias_name: str | None
    geometry: Geometry
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    sharded: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Matrices in the weight."""
        return self.geometry.units

    @property
    def out_features(self) -> int:
        """m, rows of a matrix."""
        return self.geometry.out_features

    @property
    def in_features(self) -> int:
        """d, columns of a matrix without the bias."""
        return self.geometry.in_features

    @property
    def columns(self) -> int:
        """Columns of the layer's gradient matrices: d, or d + 1 with the bias."""
        return self.in_features + (self.bias_name is not None)

    @property
    def is_convolution(self) -> bool:
        """Its input and output are [B, channels, *spatial]."""
        return self.geometry.window is not None

    @property
    def module(self) -> nn.Module:
        """The first of the modules that share the weight."""
        return self.modules[0][1]

    @property
    def weight(self) -> nn.Parameter:
        """The weight: under FSDP2 the sharded one, which modules have between steps and not in a forward."""
        return self.sharded.get("weight", self.module.weight)

    @property
    def live_weight(self) -> Tensor:
        """The weight that a forward pass which is under way works with."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is part of the factor."""
        return None if self.bias_name is None else self.sharded.get("bias", self.module.bias)

    # Weights as matrices

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """The gradient as matrices, [units, m, columns]; zeros where there is none."""
        return self.matrices(gradient_of(self.weight), None if self.bias is None else gradient_of(self.bias), dtype)

    def matrices(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Something in the shape of the weight, and of the bias if it is in the factor, as [units, m, columns]."""
        matrices = self._matrices(weight).to(dtype)
        if bias is None:
            return matrices
        return torch.cat((matrices, bias.to(dtype).view(self.units, -1, 1)), -1)

    def like_weight(self, matrices: Tensor) -> Tensor:
        """[units, m, columns] → the shape of the weight, without the bias's column."""
        matrices = matrices[..., : self.in_features]
        return matrices[0].T if self.geometry.kind == "transposed" else matrices.reshape(self.weight.shape)

    def like_bias(self, matrices: Tensor) -> Tensor:
        """[units, m, d + 1] → the bias's column, [units · m]."""
        return matrices[..., self.in_features].flatten()

    def _matrices(self, weight: Tensor) -> Tensor:
        if self.geometry.kind == "transposed":
            return weight.T.unsqueeze(0)
        return weight.reshape(self.units, self.out_features, self.in_features)

    # Calls

    def batched(self, x: Tensor) -> Tensor:
        """A convolution's input or output with its batch dimension, which torch lets a caller leave out."""
        window = self.geometry.window
        return x.unsqueeze(0) if window is not None and x.dim() == len(window.kernel) + 1 else x

    def positions(self, output: Tensor) -> torch.Size:
        """The shape of an output without its features: what a mask has to fit."""
        output = self.batched(output)
        return torch.Size((output.shape[0], *output.shape[2:])) if self.is_convolution else output.shape[:-1]

    def inputs(self, a: Tensor, most: int) -> Iterator[tuple[Tensor, slice]]:
        """A call's input as rows in at least float32, detached, ones for the bias.

        Args:
            a: [..., d], or [B, channels, *spatial].
            most: numbers in a piece; a linear layer's input is one piece, which copies nothing.

        Yields:
            [units, n, columns], and which of all N positions they are.
        """
        a = self.batched(a.detach())
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        window = self.geometry.window
        if window is None:
            flat = a.reshape(1, -1, a.shape[-1])
            yield self._with_ones(flat), slice(0, flat.shape[1])
            return
        for rows, where in chunks(a, window, self.units, most):
            yield self._with_ones(rows), where

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.bias_name is None else torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)

    def outputs(self, value: Tensor) -> Tensor:
        """A tensor in the shape of the output, [..., m] or [B, channels, *spatial] → [units, N, m]."""
        value = self.batched(value)
        if self.is_convolution:
            value = value.movedim(1, -1)
        return value.reshape(-1, self.units, self.out_features).transpose(0, 1)

    def apply(self, a: Tensor, matrices: Tensor) -> Tensor:
        """The layer's output for input a with other weights: [units, m, columns] → the shape of the output."""
        bias = None if self.bias_name is None else self.like_bias(matrices)
        a = self.batched(a)
        if self.is_convolution:
            return self.module._conv_forward(a, self.like_weight(matrices), bias)  # type: ignore[operator]
        return torch.nn.functional.linear(a, matrices[0, :, : self.in_features], bias)


def factor_blocks(layers: list[Layer], max_factor_dim: int | str) -> tuple[int, int]:
    """(k, b) of the Φ that these layers share; `auto`: the widest that any of them allows."""
    columns = layers[0].columns
    if isinstance(max_factor_dim, int):
        return block_layout(columns, max_factor_dim)
    extra = columns - layers[0].in_features
    limit = max(min(layer.in_features, layer.out_features) for layer in layers) + extra
    return block_layout(columns, max(limit, _SMALLEST_BLOCK))


@dataclass(frozen=True)
class Sides:
    """A layer's matrices [m, columns], and how factors of either side are cut: (k, b) of the outputs, of the inputs."""

    m: int
    columns: int
    left: tuple[int, int]
    right: tuple[int, int]

    @property
    def smaller(self) -> str:
        """The side with the fewer rows: ``right`` where it is a tie."""
        return RIGHT if self.columns <= self.m else LEFT

    def size(self, side: str) -> int:
        """m or columns."""
        return self.m if side == LEFT else self.columns

    def blocks(self, side: str) -> tuple[int, int]:
        """(k, b) of a side."""
        return self.left if side == LEFT else self.right


def sides_of(layer: Layer, max_factor_dim: int | str) -> Sides:
    """The sides of a layer; a factor of the outputs is cut as `factor_blocks` cuts that of the inputs."""
    m = layer.out_features
    narrow = max(min(layer.in_features, m), _SMALLEST_BLOCK)
    left = block_layout(m, max_factor_dim if isinstance(max_factor_dim, int) else narrow)
    return Sides(m, layer.columns, left, factor_blocks([layer], max_factor_dim))


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input tensor of a module's call, positional or by name."""
    value = args[0] if args else kwargs.get("input", kwargs.get("x"))
    return value if isinstance(value, Tensor) else None


def gradient_of(parameter: Tensor) -> Tensor:
    """A parameter's gradient, zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
