"""FSDP2 puts sharded parameters in place of a model's own, before LNGD is made or after: LNGD takes them over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from . import serialization
from .curvature.embeddings import EmbeddingLayer
from .distributed import is_distributed
from .routing import FROZEN_OWNER
from .sharding import Shards, is_fully_sharded, is_sharded, refuse_flat_parameters, reshard

if TYPE_CHECKING:
    from .optimizer import LNGD


def meet_shards(optimizer: LNGD) -> bool:
    """Take over the model's parameters if they have been sharded since; a look at each that is trained, until then.

    Returns:
        Whether that was done now.

    Raises:
        RuntimeError: they were replaced by something else: FSDP1, another sharding, FSDP2's gathered ones; or some of
            them only.
    """
    if optimizer._shards is not None or not is_distributed():
        return False
    current = _current(optimizer)
    sharded = {name for name, parameter in current.items() if parameter is not None and is_sharded(parameter)}
    for name, parameter in current.items():
        if parameter is not optimizer._parameters[name] and name not in sharded:
            _refuse_replaced(optimizer, name)
    if sharded:
        _adopt(optimizer, current)
    return bool(sharded)


def _current(optimizer: LNGD) -> dict[str, nn.Parameter | None]:
    """What is now in the place of each parameter that is trained."""
    trained = [r.parameter for r in optimizer._routing.routes if r.owner != FROZEN_OWNER]
    places = ((name, *optimizer._routing.homes[name]) for name in trained)
    return {name: module._parameters.get(attribute) for name, module, attribute in places}


def _refuse_replaced(optimizer: LNGD, name: str) -> None:
    model = optimizer._capture.model
    if model is None:
        return
    refuse_flat_parameters(model)
    if is_fully_sharded(model):
        raise RuntimeError(
            f"LNGD.step(): parameter '{name}' is not the sharded one, but what FSDP2 gathered of it, accepted: a step "
            "after a backward pass that reshards (set_reshard_after_backward(True), the default)"
        )


def _adopt(optimizer: LNGD, current: Mapping[str, nn.Parameter | None]) -> None:
    if optimizer.config.family == "ekfac":
        raise RuntimeError(
            "LNGD: family: 'ekfac' needs each layer's eigenvectors on every rank, got parameters sharded by FSDP2, "
            "accepted: lngd, kfac, tkfac, ng+, or DDP"
        )
    model = optimizer._capture.model
    assert model is not None
    if not all(p is not None and is_sharded(p) for p in current.values()):
        reshard(model)  # a forward pass before LNGD was made leaves the outermost ones gathered
    parameters = {name: module._parameters[attribute] for name, (module, attribute) in optimizer._routing.homes.items()}
    named: dict[str, nn.Parameter] = {name: p for name, p in parameters.items() if p is not None}
    shards = Shards(model, {name: named[name] for name in current}, optimizer._ranks.group)
    carried = serialization.state_of(optimizer) if optimizer._steps else None
    optimizer._parameters, optimizer._shards = named, shards
    optimizer._ranks.group = shards.group
    for group in optimizer.param_groups:
        names = optimizer._names.get(group["name"])
        if names is not None:
            group["params"] = [named[name] for name in names]
    for layer in optimizer._routing.layers:
        layer.sharded = {"weight": named[layer.weight_name]}
        if layer.bias_name is not None:
            layer.sharded["bias"] = named[layer.bias_name]
    for embedding in optimizer._embeddings:
        weight = named[embedding.name]
        if isinstance(embedding, EmbeddingLayer):
            embedding.shard(weight, shards.ranks, shards.rows(weight.shape[0]))
        else:
            embedding.shard(weight, shards.ranks)
    optimizer._fallback.moments.clear()
    optimizer._fallback.pool = shards.ranks
    optimizer._rounding.lost.clear()
    if carried is not None:
        serialization.load(optimizer, carried)
