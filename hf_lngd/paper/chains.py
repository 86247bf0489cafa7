"""What follows a layer, found in the forward pass by the identity of tensors, and its derivative φ'.

A chain runs from a layer's output through links and ends where its tensor is used more than once, by a function that is
no link, after the first activation (but for the gate that multiplies it), or with the forward pass. A link is a
function whose Jacobian is taken as diagonal: an activation, a norm with its statistics held fixed, a product with
another tensor, a sum with one (identity). Layout changes move entries and are undone at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..torch_internals import is_alias, same_tensor

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
        undo: takes a tensor in the layout of the output back to that of the input; None: the same layout."""

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
    known = kind.__module__ in _ELEMENTWISE_HOMES and kind.__name__ not in _NOT_ELEMENTWISE
    return known and next(module.parameters(), None) is None


def activation_derivative(activation: Callable[..., Tensor], s: Tensor) -> Tensor:
    """φ'(s), entry by entry, in at least float32 and the shape of s. A module's own hooks do not run.

    In forward mode: reverse mode saves tensors, which non-reentrant checkpointing counts when this runs within it."""
    function = activation.forward if isinstance(activation, nn.Module) else activation
    # a copy for the function: an in-place activation may not change the caller's tensor
    value = s.detach().to(torch.promote_types(s.dtype, torch.float32), copy=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit")  # by which torch makes its first dual tensor, and warns of it
        return torch.func.jvp(function, (value,), (torch.ones_like(value),))[1]


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
        if stem in _DROPOUTS or stem in _SAME:
            return Link("dropout" if stem in _DROPOUTS else "layout", "same")
        if stem in _RESHAPES:
            return Link("layout", "same", undo=lambda t: t.reshape(x.shape))
        if stem in _PERMUTES:
            return Link("layout", "same", undo=_undo_permutation(func, x.dim(), args, kwargs))
    other = args[1 - place] if len(args) == 2 else None
    is_sum, is_product = stem in _SUMS and not kwargs, stem in _PRODUCTS or (stem in _QUOTIENTS and place == 0)
    if other is None or not (is_sum or is_product) or not _keeps_shape(x, other):
        return None
    if is_sum:
        return Link("sum", "same")
    # a number is filled in on the device: to copy it there would wait
    dtype = torch.promote_types(x.dtype, torch.float32)
    factor = other.detach() if isinstance(other, Tensor) else x.new_full((), other, dtype=dtype)
    gate = isinstance(other, Tensor) and other.dim() > 0 and not isinstance(other, nn.Parameter)
    slope = (factor if stem in _PRODUCTS else 1.0 / factor).expand(x.shape)
    return Link("product", "gate", slope) if gate else Link("scale", "scale", slope)


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


# What these take from their second argument on is a shape or dtype, not the tensor.
_LIKE = {"reshape_as", "view_as", "expand_as", "type_as"}
# Questions about a tensor, and copies of it that no gradient flows through, do not use it.
_NEUTRAL = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "grad", "is_leaf", "is_cuda", "is_cpu",
    "is_meta", "is_sparse", "is_nested", "is_quantized", "_version", "_base", "itemsize", "nbytes", "size", "dim",
    "detach", "isinf", "isnan", "isfinite", "register_hook", "requires_grad_", "zeros_like", "ones_like",
}  # fmt: skip


class Chain:
    """The way of one output of a layer.

    Args:
        expected: the names of the links as found before; None: find them.
        done: called with this chain as soon as the expected links are passed.
        owner: the layer's name."""

    def __init__(
        self, expected: tuple[str, ...] | None, done: Callable[[Chain], None] | None = None, owner: str = ""
    ) -> None:
        self.expected, self._done, self.owner = expected, done, owner
        self.links: list[Link] = []
        self.uses = [0]  # of the output, and of the tensor after each link
        self.places: list[int] = []  # ids of the tensors under which a watch knows this chain
        self.closed = False

    def use(self, node: int, link: Link | None) -> bool:
        """The tensor after `node` links is used, by `link` if it is one. True: the chain took it and goes on."""
        self.uses[node] += 1
        if self.closed or node != len(self.links):
            return False
        unexpected = link is not None and self.expected is not None and self.expected[node] != link.name
        if link is None or unexpected or not self._may_follow(link):
            self.finish()
            return False
        self.links.append(link)
        self.uses.append(0)
        if self.expected is not None and len(self.links) == len(self.expected):
            self.finish()
        elif link.kind == "gate":
            self.closed = True
        return self.expected is None or not self.closed

    def _may_follow(self, link: Link) -> bool:
        activated = any(passed.kind == "activation" for passed in self.links)
        return not activated or link.kind in ("gate", "scale") or link.name in ("dropout", "layout")

    def finish(self) -> None:
        """Nothing more will follow."""
        if not self.closed:
            self.closed = True
            if self._done is not None:
                self._done(self)
                self._done = None  # it holds the layer's input and output
                self.links = []  # and these the slopes

    def names(self) -> tuple[str, ...]:
        """The names of the links that count: up to the first tensor with several uses, and to the last that matters."""
        whole = len(self.links)
        if self.expected is None:
            whole = next((i for i in range(whole) if self.uses[i] > 1), whole)
        last = max((i + 1 for i in range(whole) if self.links[i].matters), default=0)
        return tuple(link.name for link in self.links[:last])

    def slope(self) -> Tensor | None:
        """The product of the derivatives of these links, in the shape of the layer's output; None: no link."""
        slope: Tensor | None = None
        for link in reversed(self.links[: len(self.names())]):
            if slope is not None and link.undo is not None:
                slope = link.undo(slope)
            if link.slope is not None:
                slope = link.slope if slope is None else slope * link.slope
        return slope


class ChainWatch(TorchFunctionMode):
    """Follows chains while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget every chain and tensor."""
        for _, here in getattr(self, "_nodes", {}).values():
            for chain, _ in here:
                chain.places = []
        # the tensors are held, so that no other one gets their id
        self._nodes: dict[int, tuple[Tensor, list[tuple[Chain, int]]]] = {}
        self._silent = 0
        self._entered: list[tuple[Chain, int, bool]] = []

    def remove(self) -> None:
        """Leave the mode wherever it stands: others may have been entered since, and are left in their order."""
        above = []
        while (mode := torch.overrides._get_current_function_mode()) is not None:
            torch.overrides._pop_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            torch.overrides._push_mode(mode)

    def drop(self, chain: Chain) -> None:
        """Forget one chain, and the tensors that it alone was followed through."""
        for place in chain.places:
            here = self._nodes[place][1]
            here[:] = [entry for entry in here if entry[0] is not chain]
            if not here:
                del self._nodes[place]
        chain.places = []

    def follow(self, output: Tensor, chain: Chain) -> None:
        """Watch what uses this tensor."""
        self._put(output, chain, 0)

    def enter_module(self, module: nn.Module, s: Tensor | None) -> None:
        """An elementwise module is called with s (None: not to be found): one link, whatever it is made of."""
        self._silent += 1
        if self._silent > 1:
            return
        chains = self._chains_at(s)
        link = module_link(module, s) if s is not None and chains else None
        self._entered = [(chain, node, self._use(chain, node, link)) for chain, node in chains]

    def leave_module(self, output: Tensor) -> None:
        """The module is left."""
        self._silent -= 1
        if not self._silent:
            for chain, node, taken in self._entered:
                if taken:
                    self._put(output, chain, node + 1)
            self._entered = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        if self._silent or not self._nodes or name in _NEUTRAL:
            return func(*args, **kwargs)
        values = _tensors(args[:1] if name in _LIKE else args, kwargs)
        touched = [(place, *found) for place, value in enumerate(values) for found in self._chains_at(value)]
        if not touched:
            return func(*args, **kwargs)
        going_on = {place for place, chain, node in touched if not chain.closed and node == len(chain.links)}
        places = [i for i in going_on if i < len(args) and isinstance(args[i], Tensor)]
        with torch.no_grad():  # before the call: it may work in place
            links = {place: function_link(func, place, args, kwargs) for place in places}
        before = args[0] if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        is_use = _holds_tensor(result) or name == "__setitem__"
        if not is_use or (result is before and not _in_place(name)):
            return result
        for place, chain, node in touched:
            taken = self._use(chain, node, links.get(place))
            if taken and isinstance(result, Tensor):
                self._put(result, chain, node + 1)
        return result

    def _chains_at(self, value: Any) -> list[tuple[Chain, int]]:
        found = self._nodes.get(id(value))
        if found is None and is_alias(value):
            found = next((here for here in self._nodes.values() if same_tensor(here[0], value)), None)
        return [] if found is None else list(found[1])

    def _use(self, chain: Chain, node: int, link: Link | None) -> bool:
        taken = chain.use(node, link)
        if chain.expected is not None and chain.closed:  # what else becomes of its tensors is not asked
            self.drop(chain)
        return taken

    def _put(self, tensor: Tensor, chain: Chain, node: int) -> None:
        here = self._nodes.setdefault(id(tensor), (tensor, []))[1]
        here[:] = [entry for entry in here if entry[0] is not chain]  # in place: the same tensor, one link on
        here.append((chain, node))
        if id(tensor) not in chain.places:
            chain.places.append(id(tensor))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Positional arguments in their places, then named ones and members of lists, which are uses but never links."""
    inner = [item for value in args if isinstance(value, (list, tuple)) for item in value if isinstance(item, Tensor)]
    return [*args, *kwargs.values(), *inner]


def _name(func: Any) -> str:
    """The function's name, of an attribute's getter the attribute's."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_BY_ARGUMENT


# torch.nn.functional's, with an argument `inplace`: the result is their input then.
_INPLACE_BY_ARGUMENT = {
    "relu", "relu6", "silu", "mish", "hardswish", "hardtanh", "leaky_relu", "elu", "selu", "celu", "dropout",
}  # fmt: skip


def _holds_tensor(result: Any) -> bool:
    return any(isinstance(x, Tensor) for x in (result if isinstance(result, (list, tuple)) else [result]))
