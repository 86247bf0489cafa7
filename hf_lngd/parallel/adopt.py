"""FSDP2 puts sharded parameters in place of a model's own, before LNGD is made or after: LNGD takes them over."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
    trained = routing.trained()
    current = {name: routing.homes[name][0]._parameters.get(routing.homes[name][1]) for name in trained}
    sharded = {name for name, parameter in current.items() if parameter is not None and is_sharded(parameter)}
    for name, parameter in current.items():
        if parameter is not trained[name] and name not in sharded:
            check_not_flat(model)
            if is_fully_sharded(model):
                raise RuntimeError(
                    f"LNGD.step(): parameter '{name}' is not the sharded one, but what FSDP2 gathered of it, accepted: "
                    "a step after a backward pass that reshards (set_reshard_after_backward(True), the default)"
                )
    return _adopt(core, model, group) if sharded else {}


def _adopt(core: Core, model: nn.Module, group: Any) -> dict[nn.Parameter, nn.Parameter]:
    routing, old = core.routing, core.routing.trained()
    if core.config.family == "ekfac":
        raise RuntimeError(
            "LNGD: family: 'ekfac' needs each layer's eigenvectors on every rank, got parameters sharded by FSDP2, "
            "accepted: lngd, kfac, tkfac, ng+, or DDP"
        )
    if not all(is_sharded(routing.homes[name][0]._parameters[routing.homes[name][1]]) for name in old):  # type: ignore[arg-type]
        reshard(model)  # a forward pass before LNGD was made leaves the outermost ones gathered
    places = {name: module._parameters[attribute] for name, (module, attribute) in routing.homes.items()}
    parameters: dict[str, nn.Parameter] = {name: p for name, p in places.items() if p is not None}
    layout = Rows(model, {name: parameters[name] for name in old}, group)
    carried = dict(state.save(core))
    steps, described = core.steps, state.describe(core)
    routing.parameters = parameters
    for layer in routing.layers:
        layer.weight = parameters[layer.weight_name]
        if layer.bias_name is not None:
            layer.bias = parameters[layer.bias_name]
    for table in core.embeddings:
        table.weight = parameters[table.name]
    core.layout = layout
    replaced = {old[name]: parameters[name] for name in old}
    for before, now in replaced.items():  # zeros of torch.distributed.checkpoint, which makes a step to make the state
        if before.grad is not None and now.grad is None:
            now.grad = layout.shard(before.grad)
    core.states.clear()
    if steps:
        moved: dict[Any, dict[str, Tensor]] = {replaced.get(p, p): dict(own) for p, own in carried.items()}
        state.load(core, moved, described)
    else:
        state.clear(core)
    return replaced
