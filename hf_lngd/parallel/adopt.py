"""FSDP2 puts sharded parameters in place of a model's own, before LNGD is made or after: LNGD takes them over."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import state
from ..core import Core
from ..torch_internals import check_not_flat, is_fully_sharded, is_sharded, reshard
from .layout import Rows
from .ranks import is_distributed


def adopt_shards(core: Core, group: Any) -> dict[nn.Parameter, nn.Parameter]:
    """Take over the model's parameters if they have been sharded since; a look at each that is trained, until then.

    Args:
        group: the process group of LNGD.

    Returns:
        Each parameter that was replaced, and what stands in its place.

    Raises:
        RuntimeError: they were replaced by FSDP1, another sharding, FSDP2's gathered ones; or some of them only."""
    model, routing = core.capture.model, core.routing
    if core.layout.shards_rows or not is_distributed() or model is None:
        return {}
    old, current = routing.trained(), routing.current()
    for name, parameter in old.items():
        if current[name] is not parameter and not is_sharded(current[name]):
            check_not_flat(model)
            if is_fully_sharded(model):
                raise RuntimeError(
                    f"LNGD.step(): parameter '{name}' is not the sharded one, but what FSDP2 gathered of it, accepted: "
                    "a step after a backward pass that reshards (set_reshard_after_backward(True), the default)"
                )
    if not any(is_sharded(current[name]) for name in old):
        return {}
    if core.config.family == "ekfac":
        raise RuntimeError(
            "LNGD: family: 'ekfac' needs each layer's eigenvectors on every rank, got parameters sharded by FSDP2, "
            "accepted: lngd, kfac, tkfac, ng+, or DDP"
        )
    if not all(is_sharded(current[name]) for name in old):
        reshard(model)  # a forward pass before LNGD was made leaves the outermost ones gathered
        current = routing.current()
    layout = Rows(model, {name: current[name] for name in old}, group)
    replaced = {parameter: current[name] for name, parameter in old.items()}
    carried = {replaced.get(p, p): dict(own) for p, own in state.save(core).items()}
    steps, described = core.steps, state.describe(core)
    routing.parameters = {name: parameter for name, parameter in current.items() if parameter is not None}
    core.layout = layout
    core.read_parameters()
    for before, now in replaced.items():  # zeros of torch.distributed.checkpoint, which makes a step to make the state
        if before.grad is not None and now.grad is None:
            whole = before.grad
            now.grad = layout.as_sharded(whole[layout.rows(len(whole))].clone(), whole.shape)
    core.states.clear()
    if steps:
        state.load(core, carried, described)
    else:
        state.clear(core)
    return replaced
