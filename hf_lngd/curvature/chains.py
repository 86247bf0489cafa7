"""What follows a layer, found in the forward pass by the identity of tensors, and its derivative.

A chain runs from a layer's output through links (`links.Link`) and ends where its tensor is used more than once, by
a function that is no link, after the first activation (but for the gate that multiplies it), or with the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import Layer
from .links import Link, function_link, module_link
from .topology import is_alias, same_tensor

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
        owner: the layer's name.
    """

    def __init__(
        self, expected: tuple[str, ...] | None, done: Callable[[Chain], None] | None = None, owner: str = ""
    ) -> None:
        self.expected, self._done, self.owner = expected, done, owner
        self.links: list[Link] = []
        self.uses = [0]  # of the output, and of the tensor after each link
        self.places: list[int] = []  # ids of the tensors under which a watch knows this chain
        self.closed = False

    def use(self, node: int, link: Link | None, full: bool) -> bool:
        """The tensor after `node` links is used, by `link` if it is one. True: the chain took it and goes on."""
        self.uses[node] += 1
        if self.closed or node != len(self.links) or link is None or not self._may_follow(link, full):
            if not self.closed and node == len(self.links):
                self.finish()
            return False
        if self.expected is not None and self.expected[node] != link.name:
            self.finish()
            return False
        self.links.append(link)
        self.uses.append(0)
        if self.expected is not None and len(self.links) == len(self.expected):
            self.finish()
        elif not full or link.kind == "gate":
            self.closed = True
        return self.expected is None or not self.closed

    def _may_follow(self, link: Link, full: bool) -> bool:
        if not full:
            return link.kind == "activation" and not self.links
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
    """Follows chains while it is active.

    Args:
        full: through norms, sums, products and layouts; otherwise only into an activation that follows at once.
    """

    def __init__(self, full: bool) -> None:
        super().__init__()
        self._full = full
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
        kwargs = kwargs or {}
        if self._silent or not self._nodes or _name(func) in _NEUTRAL:
            return func(*args, **kwargs)
        touched = [
            (place, *found)
            for place, value in enumerate(_tensors(args[:1] if _name(func) in _LIKE else args, kwargs))
            for found in self._chains_at(value)
        ]
        if not touched:
            return func(*args, **kwargs)
        with torch.no_grad():  # before the call: it may work in place
            links = {
                place: function_link(func, place, args, kwargs)
                for place in {place for place, chain, node in touched if self._is_open(chain, node)}
                if place < len(args) and isinstance(args[place], Tensor)
            }
        before = args[0] if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        is_use = _holds_tensor(result) or _name(func) == "__setitem__"
        if not is_use or (result is before and not _in_place(func)):
            return result
        for place, chain, node in touched:
            taken = self._use(chain, node, links.get(place))
            if taken and isinstance(result, Tensor):
                self._put(result, chain, node + 1)
        return result

    def _is_open(self, chain: Chain, node: int) -> bool:
        return not chain.closed and node == len(chain.links)

    def _chains_at(self, value: Any) -> list[tuple[Chain, int]]:
        found = self._nodes.get(id(value))
        if found is None and is_alias(value):
            found = next((here for here in self._nodes.values() if same_tensor(here[0], value)), None)
        return [] if found is None else list(found[1])

    def _use(self, chain: Chain, node: int, link: Link | None) -> bool:
        taken = chain.use(node, link, self._full)
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


def _in_place(func: Any) -> bool:
    name = _name(func)
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_BY_ARGUMENT


# torch.nn.functional's, with an argument `inplace`: the result is their input then.
_INPLACE_BY_ARGUMENT = {
    "relu", "relu6", "silu", "mish", "hardswish", "hardtanh", "leaky_relu", "elu", "selu", "celu", "dropout",
}  # fmt: skip


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, (list, tuple)) and any(isinstance(item, Tensor) for item in result)
    )


@dataclass
class Pending:
    """A call of a layer whose group is not known yet."""

    layer: Layer
    a: Tensor
    output: Tensor
    chain: Chain
    version: int
