"""One link of what follows a layer: its name, and the derivative of its output by its input, entry by entry.

A link is a function whose Jacobian is taken as diagonal: an activation, a norm with its statistics held fixed, a
product with another tensor, a sum with one (identity). Layout changes move entries and are undone at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Modules that apply one function to each entry: φ'(s) is the derivative of that function. By module of
# definition, so that transformers' GELUs count and this package need not import transformers.
_ELEMENTWISE_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_ELEMENTWISE = ("Softmax", "LogSoftmax", "Softmax2d", "Softmin", "GLU", "MultiheadAttention", "PReLU", "RReLU")

_ACTIVATIONS = {
    "relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "leaky_relu",
    "elu", "selu", "celu", "softplus", "softsign", "logsigmoid",
}  # fmt: skip
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "sub", "subtract", "__sub__", "__isub__"}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__", "__imul__"}
_QUOTIENTS = {"div", "divide", "true_divide", "__truediv__", "__itruediv__"}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d"}
_SAME = {"contiguous", "to", "float", "double", "clone", "type_as"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_PERMUTES = {"permute", "transpose", "movedim", "swapaxes"}
# Arguments in their order, of the functions of torch.nn.functional that norms call.
_NORMS = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}
_EPS = 1e-5


@dataclass
class Link:
    """One function on the way.

    Attributes:
        name: for the routing table: ``relu``, ``batch_norm``, ``product``, …
        kind: activation, norm, gate (a product with another activation), scale (with a parameter or a number), same
            (sum, dropout, layout).
        slope: the derivative, in the shape of the input; None: 1.
        undo: takes a tensor in the layout of the output back to that of the input; None: the same layout.
    """

    name: str
    kind: str
    slope: Tensor | None = None
    undo: Callable[[Tensor], Tensor] | None = None

    @property
    def matters(self) -> bool:
        """False for what only moves entries, adds to them or scales all of them: the end of a chain leaves it out."""
        return self.kind in ("activation", "norm", "gate")


def is_elementwise(module: nn.Module) -> bool:
    """An activation module that works entry by entry and has no parameters."""
    kind = type(module)
    return (
        kind.__module__ in _ELEMENTWISE_HOMES
        and kind.__name__ not in _NOT_ELEMENTWISE
        and next(module.parameters(), None) is None
    )


def activation_derivative(activation: Callable[..., Tensor], s: Tensor) -> Tensor:
    """φ'(s), entry by entry, in at least float32 and the shape of s. A module's own hooks do not run.

    Forward mode: reverse mode saves tensors, which non-reentrant checkpointing counts when this runs within it.
    Reentrant checkpointing, which does not, switches forward mode off: then reverse mode it is.
    """
    function = activation.forward if isinstance(activation, nn.Module) else activation
    # a copy for the function: an in-place activation may not change the caller's tensor
    value = s.detach().to(torch.promote_types(s.dtype, torch.float32), copy=True)
    with torch.no_grad(), forward_ad.dual_level():
        output = function(forward_ad.make_dual(value, torch.ones_like(value)))
        derivative = forward_ad.unpack_dual(output).tangent
    if derivative is None:
        with torch.enable_grad():
            leaf = s.detach().to(value.dtype).requires_grad_()
            (derivative,) = torch.autograd.grad(function(leaf.clone()).sum(), leaf)
    return derivative.detach()


def module_link(module: nn.Module, s: Tensor) -> Link:
    """The link of an elementwise module that is called with s."""
    return Link(type(module).__name__, "activation", activation_derivative(module, s))


def function_link(func: Callable[..., Any], place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Link | None:
    """The link of a torch function whose argument `place` is the tensor that is followed; None: not one of ours."""
    name = getattr(func, "__name__", "")
    stem = name.removesuffix("_") if not name.endswith("__") else name
    x = args[place].detach()
    if place == 0:
        if stem in _ACTIVATIONS:
            return Link(stem, "activation", activation_derivative(lambda s: func(s, *args[1:], **kwargs), x))
        if stem in _NORMS and func is getattr(nn.functional, stem):  # torch's own of the name order arguments otherwise
            slope = _norm_slope(stem, x, args, kwargs)
            return None if slope is None else Link(stem, "norm", slope.expand(x.shape))
        if stem in _DROPOUTS:
            return Link("dropout", "same")
        if stem in _SAME:
            return Link("layout", "same")
        if stem in _RESHAPES:
            return Link("layout", "same", undo=lambda t: t.reshape(x.shape))
        if stem in _PERMUTES:
            return Link("layout", "same", undo=_undo_permutation(func, x.dim(), args, kwargs))
    other = args[1 - place] if len(args) == 2 else None
    if stem in _SUMS and other is not None and not kwargs and _keeps_shape(x, other):
        return Link("sum", "same")
    if (stem in _PRODUCTS or (stem in _QUOTIENTS and place == 0)) and other is not None and _keeps_shape(x, other):
        # a number is filled in on the device: to copy it there would wait
        dtype = torch.promote_types(x.dtype, torch.float32)
        factor = other.detach() if isinstance(other, Tensor) else x.new_full((), other, dtype=dtype)
        gate = isinstance(other, Tensor) and other.dim() > 0 and not isinstance(other, nn.Parameter)
        slope = (factor if stem in _PRODUCTS else 1.0 / factor).expand(x.shape)
        return Link("product" if gate else "scale", "gate" if gate else "scale", slope)
    return None


def _keeps_shape(x: Tensor, other: Any) -> bool:
    """x ∘ other has the shape of x."""
    if not isinstance(other, Tensor):
        return isinstance(other, (int, float))
    return not other.is_complex() and torch.broadcast_shapes(x.shape, other.shape) == x.shape


def _undo_permutation(
    func: Callable[..., Tensor], dims: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    moved = func(torch.empty(tuple(range(2, 2 + dims)), device="meta"), *args[1:], **kwargs)
    order = [size - 2 for size in moved.shape]
    return lambda t: t.permute([order.index(i) for i in range(dims)])


def _norm_slope(name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """γ / σ with the statistics held fixed, broadcastable to x."""
    given = {**dict(zip(_NORMS[name], args, strict=False)), **kwargs}
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, eps = given.get("weight"), given.get("eps")
    eps = (torch.finfo(x.dtype).eps if name == "rms_norm" else _EPS) if eps is None else eps
    channels = (1, -1) + (1,) * (x.dim() - 2)
    if name == "batch_norm":
        if given.get("training"):
            variance = x.var([d for d in range(x.dim()) if d != 1], correction=0)
        elif given.get("running_var") is not None:
            variance = given["running_var"].detach().to(x.dtype)
        else:
            return None
        root = (variance + eps).rsqrt().view(channels)
    elif name == "group_norm":
        grouped = x.reshape(x.shape[0], given["num_groups"], -1)
        root = (grouped.var(-1, correction=0) + eps).rsqrt()
        root = root.repeat_interleave(x.shape[1] // given["num_groups"], 1).view(*x.shape[:2], *channels[2:])
    else:
        over = tuple(range(-len(given["normalized_shape"]), 0))
        square = x.square().mean(over, keepdim=True) if name == "rms_norm" else x.var(over, correction=0, keepdim=True)
        root = (square + eps).rsqrt()
        channels = tuple(given["normalized_shape"])
    return root if weight is None else root * weight.detach().to(x.dtype).view(channels)
