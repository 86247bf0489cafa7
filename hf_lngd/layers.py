"""A layer as matrices: which modules LNGD can take, and the tensors of one call of them in a canonical form.

A layer is one weight: a matrix, or for a grouped convolution one matrix a group (its units). Modules that share it
(tied) are one layer, whose statistics are summed. A new type of layer is one function, see `add_layer_type`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .linalg import block_layout, state_dtype

# Below this width a whole Φ costs next to nothing, so `max_factor_dim="auto"` does not cut further.
SMALLEST_BLOCK = 64
# The patches of a convolution's input hold at most so many numbers at once (64 MiB in float32).
MOST_PATCHES = 64 << 18


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input, one number a spatial dimension; `padding` as `torch.nn.functional.pad`
    takes it: two numbers a dimension, the last one first."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: Any) -> Window:
        """The window of a convolution."""
        if module.padding == "same":  # torch pads one more behind where it cannot be even
            total = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            pairs = [(t // 2, t - t // 2) for t in total]
        elif module.padding == "valid":
            pairs = [(0, 0)] * len(module.kernel_size)
        else:
            pairs = [(p, p) for p in module.padding]
        padding = tuple(number for pair in reversed(pairs) for number in pair)
        return cls(module.kernel_size, module.stride, module.dilation, padding, module.padding_mode)


def patches(x: Tensor, window: Window) -> Tensor:
    """x [B, C, *spatial] → [B, C, *out, *kernel], a view of x (padded, where there is padding)."""
    if any(window.padding):
        mode = "constant" if window.mode == "zeros" else window.mode
        x = torch.nn.functional.pad(x, window.padding, mode)
    for i, (k, s, d) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    return x


def _as_rows(view: Tensor, units: int) -> Tensor:
    """[B, C, *out, *kernel] → [units, B·out, C/units·kernel]: a row a location, columns as in the weight."""
    n = (view.dim() - 2) // 2
    grouped = view.unflatten(1, (units, view.shape[1] // units))
    order = (1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    columns = view.shape[1] // units * prod(view.shape[2 + n :])
    return grouped.permute(order).reshape(units, -1, columns)


def patch_chunks(x: Tensor, window: Window, units: int, most: int) -> Iterator[tuple[Tensor, slice]]:
    """The patches of x [B, C, *spatial] in pieces of at most `most` numbers (but a line of locations at least): rows
    [units, n, C/units·kernel], and which of all B·out locations they are."""
    view = patches(x, window)
    lines, per_line = view.shape[2], prod(view.shape[3 : 2 + len(window.kernel)])
    size = view.shape[1] * prod(window.kernel) * per_line
    images, start = max(1, most // max(1, size * lines)), 0
    step = lines if size * lines <= most else max(1, most // size)
    for image in range(0, view.shape[0], images):
        for line in range(0, lines, step):
            rows = _as_rows(view[image : image + images, :, line : line + step], units)
            yield rows, slice(start, start + rows.shape[1])
            start += rows.shape[1]


@dataclass(frozen=True)
class Geometry:
    """How a module's weight and input become matrices.

    Attributes:
        kind: ``linear`` (weight [m, d]), ``transposed`` (transformers' Conv1D: weight [d, m]), ``convolution``.
        units: matrices [out_features, in_features] in the weight: groups of a convolution, else 1."""

    kind: str
    units: int
    out_features: int
    in_features: int
    window: Window | None = None

    def reads_like(self, other: Geometry) -> bool:
        """Both make the same rows of the same input."""
        return (self.units, self.in_features, self.window) == (other.units, other.in_features, other.window)


# Types that users added, see `add_layer_type`.
_ADDED_TYPES: dict[type[nn.Module], Callable[[Any], Geometry | None]] = {}


def add_layer_type(kind: type[nn.Module], look: Callable[[Any], Geometry | None] | None) -> None:
    """Let LNGD take modules of a type of your own, in optimizers that are made afterwards (see docs/extending.md).

    Args:
        kind: the type itself; its subclasses may compute something else and do not count.
        look: a module → its geometry, ``linear`` or ``transposed``; None for a module that stays AdamW's. The module
            is called with one tensor a [..., d] and gives W a + b, [..., m]: `weight` is W, its first dimensions make
            m and the others d (``transposed``: it is [d, m]), `bias` is [m] or there is none. None in the place of
            the function takes the type out again."""
    if look is None:
        _ADDED_TYPES.pop(kind, None)
    else:
        _ADDED_TYPES[kind] = look


def _added_geometry(module: nn.Module, weight: Tensor) -> Geometry | None:
    """What a user's function says of a module; ValueError if it does not fit the weight or the bias."""
    found = _ADDED_TYPES[type(module)](module)
    if found is None:
        return None
    m, d = found.out_features, found.in_features
    shape, bias = list(weight.shape), module._parameters.get("bias")
    leading = [prod(shape[:i]) for i in range(len(shape) + 1)]  # m has to be some first dimensions of the weight
    fits = m in leading if found.kind == "linear" else found.kind == "transposed" and shape == [d, m]
    fits = fits and m * d == weight.numel() and found.units == 1
    if not fits or (bias is not None and list(bias.shape) != [m]):
        raise ValueError(
            f"add_layer_type: {type(module).__name__}: got {found.kind} [{m}, {d}] for a weight {shape}"
            f"{'' if bias is None else f' and a bias {list(bias.shape)}'}, accepted: linear or transposed, m·d "
            "numbers, one unit, a bias [m]"
        )
    return found


def geometry_of(module: Any) -> Geometry | None:
    """The geometry of a module that LNGD can take: its forward is torch's own, with a plain weight, or its type was
    added by :func:`add_layer_type`; else None."""
    weight, kind = module._parameters.get("weight"), type(module)  # a parametrization would have taken it away
    if weight is None or not weight.numel():
        return None
    if kind in _ADDED_TYPES:
        return _added_geometry(module, weight)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return Geometry("linear", 1, *weight.shape)
    for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        plain = isinstance(module, base) and kind.forward is base.forward
        if plain and kind._conv_forward is base._conv_forward:
            units, window = int(module.groups), Window.of(module)
            return Geometry("convolution", units, weight.shape[0] // units, weight[0].numel(), window)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return Geometry("transposed", 1, weight.shape[1], weight.shape[0])
    return None


@dataclass(eq=False)
class Layer:
    """A linear map that LNGD takes: `units` matrices [m, d]; with a bias in the factor, this is column d + 1.

    Attributes:
        name: of the first of its modules.
        weight, bias: the parameters that are trained; under FSDP2 the sharded ones. No bias: not in the factor.
        modules: (name, module) of all that share the weight.
        heads: blocks of rows that are orthogonalised each by itself, see `heads`."""

    name: str
    geometry: Geometry
    weight_name: str
    weight: nn.Parameter
    bias_name: str | None = None
    bias: nn.Parameter | None = None
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    heads: int = 1

    @property
    def units(self) -> int:
        """Matrices in the weight."""
        return self.geometry.units

    @property
    def m(self) -> int:
        """Rows of a matrix."""
        return self.geometry.out_features

    @property
    def d(self) -> int:
        """Columns of a matrix without the bias."""
        return self.geometry.in_features

    @property
    def columns(self) -> int:
        """Columns of the layer's gradient matrices: d, or d + 1 with the bias."""
        return self.d + (self.bias is not None)

    @property
    def is_convolution(self) -> bool:
        """Its input and output are [B, channels, *spatial]."""
        return self.geometry.window is not None

    @property
    def module(self) -> Any:
        """The first of the modules that share the weight."""
        return self.modules[0][1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it is in the factor."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def like(self) -> Tensor:
        """An empty tensor with the device and dtype of the layer's state."""
        return torch.empty(0, device=self.weight.device, dtype=state_dtype(self.weight.dtype))

    def matrices(self, values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Something in the shapes of `parameters` as [units, m, columns]."""
        weight, *bias = values
        transposed = self.geometry.kind == "transposed"
        matrices = (weight.T.unsqueeze(0) if transposed else weight.reshape(self.units, self.m, self.d)).to(dtype)
        return torch.cat((matrices, bias[0].to(dtype).view(self.units, -1, 1)), -1) if bias else matrices

    def like_parameters(self, matrices: Tensor) -> list[Tensor]:
        """[units, m, columns] → the shapes of `parameters`: views where that is possible."""
        weight = matrices[..., : self.d]
        weight = weight[0].T if self.geometry.kind == "transposed" else weight.reshape(self.weight.shape)
        return [weight] if self.bias is None else [weight, matrices[..., self.d].flatten()]

    def batched(self, x: Tensor) -> Tensor:
        """A convolution's input or output with its batch dimension, which torch lets a caller leave out."""
        window = self.geometry.window
        return x.unsqueeze(0) if window is not None and x.dim() == len(window.kernel) + 1 else x

    def locations(self, output: Tensor) -> torch.Size:
        """The shape of an output without its features, [B, …]: what a mask has to fit."""
        output = self.batched(output)
        return torch.Size((output.shape[0], *output.shape[2:])) if self.is_convolution else output.shape[:-1]

    def inputs(self, a: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """A call's input [..., d] or [B, channels, *spatial] as rows [units, n, columns] in at least float32, detached,
        ones for the bias, and which of all N tokens or locations they are; a linear layer's in one piece."""
        a = self.batched(a.detach())
        a = a.to(state_dtype(a.dtype))
        if self.geometry.window is None:
            a = a.reshape(1, -1, a.shape[-1])
            pieces = iter([(a, slice(0, a.shape[1]))])
        else:
            pieces = patch_chunks(a, self.geometry.window, self.units, MOST_PATCHES)
        for rows, where in pieces:
            yield rows if self.bias is None else torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2), where

    def outputs(self, value: Tensor) -> Tensor:
        """A tensor in the shape of the output, [..., m] or [B, channels, *spatial] → [units, N, m]."""
        value = self.batched(value)
        value = value.movedim(1, -1) if self.is_convolution else value
        return value.reshape(-1, self.units, self.m).transpose(0, 1)

    def apply(self, a: Tensor, matrices: Tensor) -> Tensor:
        """The layer's output for input a with other weights: [units, m, columns] → the shape of the output."""
        a, (weight, *bias) = self.batched(a), self.like_parameters(matrices)
        if self.is_convolution:
            return self.module._conv_forward(a, weight, bias[0] if bias else None)
        return torch.nn.functional.linear(a, matrices[0, :, : self.d], bias[0] if bias else None)


def factor_blocks(layer: Layer, max_factor_dim: int | str) -> tuple[int, int]:
    """(k, b) of a layer's Φ; `auto`: as wide as its narrower side."""
    if isinstance(max_factor_dim, int):
        return block_layout(layer.columns, max_factor_dim)
    limit = min(layer.d, layer.m) + layer.columns - layer.d
    return block_layout(layer.columns, max(limit, SMALLEST_BLOCK))


def output_blocks(layer: Layer, max_factor_dim: int | str) -> tuple[int, int]:
    """(k, b) of a layer's full Ψ: its heads, or as :func:`factor_blocks` on the other side."""
    if layer.heads > 1:
        return layer.heads, layer.m // layer.heads
    narrow = max(min(layer.d, layer.m), SMALLEST_BLOCK)
    return block_layout(layer.m, max_factor_dim if isinstance(max_factor_dim, int) else narrow)
