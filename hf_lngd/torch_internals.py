"""Everything that is read from outside torch's public interface, and the hooks that rest on it: backward passes under
way, graph nodes, calls on the stack, compiled functions. Seen in torch 2.9 to 2.13."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

_WRAPPED = "_orig_mod"  # what torch.compile calls the module that it wraps
_RECOMPUTES = "_checkpoint_hook.__init__.<locals>.unpack_hook"


def plain_name(name: str) -> str:
    """The name of a parameter or module, without what torch.compile adds to it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps, or the model itself."""
    inner = model._modules.get(_WRAPPED)
    return model if inner is None else inner


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose import takes a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of one that is not sharded. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on it or a part of it."""
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def plain_class(model: nn.Module) -> Any:
    """A model's class without what `fully_shard` has put before it."""
    return next(kind for kind in type(model).__mro__ if not hasattr(kind, "set_requires_gradient_sync"))


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 has gathered."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.reshard()  # type: ignore[operator]


def cpu_capabilities() -> Mapping[str, Any]:
    """What this CPU has instructions for, by the names of `torch.cpu.get_capabilities`. torch 2.9 has no such function
    and knows of those for bfloat16 only x86's."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"amx_bf16": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def check_not_flat(model: nn.Module) -> None:
    """Raise RuntimeError for a model that FSDP1 wraps, from without or within: layers have no matrices any more."""
    managed = not is_fully_sharded(model)  # what torch marks so is FSDP1's then
    for name, module in model.named_modules():
        marked = managed and getattr(module, "_is_fsdp_managed_module", False)
        if marked or type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                f"LNGD: got FSDP1 (FullyShardedDataParallel) around '{name or 'the model'}', which flattens what is in "
                "it, accepted: FSDP2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)"
            )


class Hook:
    """A hook on a module that copies and pickles of the module do not get: what stands there in its place does nothing.
    Else a copy of the model would hold a copy of the optimizer, and ``torch.save(model)`` would fail."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script: got a model with LNGD's hooks, which are there in factor steps, accepted: "
            "optimizer.close() before; torch.jit.trace takes it as it is"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # a callable of the standard library that takes anything and returns None: files load without hf_lngd
        return getattr, (nullcontext(), "__exit__")


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input tensor of a module's call, positional or by name."""
    value = args[0] if args else kwargs.get("input", kwargs.get("x"))
    return value if isinstance(value, Tensor) else None


def in_backward() -> bool:
    """True within a backward pass, where checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """True within torch.func (vmap, grad, jvp, …), whose tensors may not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _callers() -> Iterator[FrameType]:
    """The stack, from the inside out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def reentrant_segment() -> Any:
    """What torch's reentrant checkpoint keeps of the segment whose forward or recomputation is on the stack, the same
    object in both; None: there is none."""
    codes = (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__)
    frame = next((frame for frame in _callers() if frame.f_code in codes), None)
    return None if frame is None else frame.f_locals["ctx"]


def in_discarded_recomputation() -> bool:
    """True where torch's checkpoint that is not reentrant recomputes a segment: for the tensors that are saved on the
    way, no backward pass goes through what comes out."""
    return in_backward() and any(frame.f_code.co_qualname == _RECOMPUTES for frame in _callers())


def calls_under_way(model: nn.Module) -> int:
    """Calls of this module on the stack: one that an interrupt ended is there no more, though no hook saw its end."""
    calls = (frame for frame in _callers() if frame.f_code is nn.Module._call_impl.__code__)
    return sum(frame.f_locals.get("self") is model for frame in calls)


def stepping_scaler() -> GradScaler | None:
    """The gradient scaler whose ``step`` is on the stack, if there is one. It tells an optimizer neither the scale,
    which gradients in hooks still have, nor that it leaves a step out."""
    frame = next((frame for frame in _callers() if frame.f_code is GradScaler.step.__code__), None)
    return None if frame is None else frame.f_locals.get("self")


def origin(output: Tensor) -> Tensor:
    """The tensor to hook for the gradient of a layer's output.

    A linear layer's output is a view where its input has three dimensions or more. Work on a view in place takes a hook
    on it out of the graph, not one on what it is a view of."""
    base = output._base if output._is_view() else None
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def accumulator(parameter: Tensor) -> Any:
    """The node of the graph that accumulates this parameter's gradient; None: it wants none. To be asked for in the
    forward pass: FSDP2 puts another parameter in its place afterwards."""
    with torch.enable_grad():
        function = parameter.view_as(parameter).grad_fn
    return None if function is None else function.next_functions[0][0]


def _accumulates(node: Any) -> bool:
    """Whether the backward pass that runs goes to such a node, to leave a gradient there or, where
    `torch.autograd.grad` asks for this very parameter, to return it."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the latter
        return True


# FSDP2 hands each module that it wraps an alias of its input, behind a node of this kind in the graph.
_ALIAS = "RegisterPostBackwardFunctionBackward"


def is_alias(tensor: Any) -> bool:
    """Whether it is what FSDP2 made of a module's input: the same numbers in another object."""
    return type(getattr(tensor, "grad_fn", None)).__name__ == _ALIAS


def same_tensor(first: Tensor | None, second: Tensor) -> bool:
    """Whether both are one tensor; aliases of FSDP2 are the tensor that they were made of."""
    if first is None or first is second:
        return first is not None
    return (is_alias(first) or is_alias(second)) and _edge(first) == _edge(second)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    node: Any = tensor.grad_fn
    place = tensor.output_nr
    while type(node).__name__ == _ALIAS:  # where it comes from before FSDP2
        node, place = node.next_functions[place]
    return node, place


# Compiled code passes over hooks that came later, and hooks that are there when a model is compiled are traced, layer
# by layer. So while statistics are collected the code runs as it was written; what was compiled waits, unchanged.
_EAGER = "force_eager"
_collectors: weakref.WeakSet[Any] = weakref.WeakSet()
_met: weakref.WeakSet[Any] = weakref.WeakSet()  # whose end is awaited
_ours: list[tuple[weakref.ref[Any], Any]] = []  # stances that were set here, each with the one it was set in place of


def run_eagerly(collector: object, wanted: bool) -> None:
    """Compiled functions of this process run eagerly as long as some collector that is alive wants it.

    A stance of ours, put in the place of the one that was there (`torch.compiler.set_stance`, which costs nothing and
    compiles nothing again), says ``force_eager`` while it is wanted and else what that one said. So it may stay where
    it is, and comes to no harm where a ``with`` of the user's puts it back after LNGD is closed."""
    (_collectors.add if wanted else _collectors.discard)(collector)
    if wanted and collector not in _met:
        _met.add(collector)
        weakref.finalize(collector, _take_stance).atexit = False
    _take_stance()


class Collector:
    """What gathers something of forward passes between two steps, by hooks: of those whose backward pass brings one of
    `weights` a gradient which the step then uses.

    A loop that drops gradients in place of making a step (sets them to None by whatever means, or calls `zero_grad`)
    drops with them what was gathered. Nothing waits for the device, so zeros that somebody else writes are not told
    from gradients. Nor are gradients that somebody puts aside told from dropped ones: micro-batches before are not
    counted then. FSDP2 keeps gradients of micro-batches elsewhere, so there only `zero_grad` tells.

    Attributes:
        doubtful: what was gathered is of a step that may be left out; the next backward pass then begins anew."""

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self.enabled, self.closed = True, False
        self._weights = weights
        self._handles: list[RemovableHandle] = []
        self._task = -1
        self.forget()

    def follow(self, output: Tensor, weight: Tensor, take: Callable[[Tensor], None]) -> None:
        """Give the gradient of a layer's output to `take` in each backward pass that brings the weight its own. `take`
        must not hold the output, or neither would ever be freed."""
        node = accumulator(weight) if output.requires_grad else None

        def arrive(gradient: Tensor | None) -> None:
            if gradient is None or not _accumulates(node):
                return
            task = torch._C._current_graph_task_id()
            if task != self._task:  # the first gradient of a backward pass
                self._task = task
                self.begin_anew_if_dropped()
            self._came = True
            take(gradient)

        if node is not None:
            origin(output).register_hook(arrive)

    def begin_anew_if_dropped(self) -> None:
        """Forget what was gathered if its gradients are gone."""
        gone = self._came and all(w.grad is None and not is_sharded(w) for w in self._weights())
        if gone or self._dropped or self.doubtful:
            self.forget()

    def drop(self) -> None:
        """`zero_grad` is called."""
        if self._came and any(weight.grad is not None for weight in self._weights()):
            self._dropped = True

    def collect(self, enabled: bool) -> None:
        """Collect statistics of forward passes, or stop collecting: then compiled models may run compiled."""
        self.enabled = enabled
        run_eagerly(self, enabled and bool(self._handles))

    def forget(self) -> None:
        """Forget what was gathered for the current step."""
        self._came = self._dropped = self.doubtful = False

    def disarm(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        run_eagerly(self, False)

    def close(self) -> None:
        """Remove every hook, for good."""
        self.closed = True
        self.disarm()
        self.forget()


def stop_running_eagerly() -> None:
    """Nobody wants it any more, whoever did: for tests, which leave optimizers behind."""
    _collectors.clear()
    _take_stance()


def stance_in_the_way() -> str | None:
    """What the user's stance says that is in the place of ours, which was wanted."""
    stance = torch._dynamo.eval_frame._stance.stance
    return stance if _collectors and stance != _EAGER else None


def _take_stance() -> None:
    wanted = bool(_collectors)
    _ours[:] = [(own, before) for own, before in _ours if own() is not None]
    for own, before in _ours:
        told = dataclasses.replace(before, stance=_EAGER, backend=None) if wanted else before
        vars(own()).update(vars(told))
    if wanted and all(own() is not torch._dynamo.eval_frame._stance for own, _ in _ours):
        placed = torch.compiler.set_stance(_EAGER)
        _ours.append((weakref.ref(placed.stance), dataclasses.replace(placed.prev)))
