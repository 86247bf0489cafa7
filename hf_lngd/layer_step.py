"""The step of LNGD's own layers: gradients to banks, updates to weights; of whole parameters, or of sharded ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .curvature.layers import Layer, gradient_of
from .curvature.rounding import Rounding
from .curvature.sums import RowSamples
from .preconditioner import Preconditioner
from .sharding import Shards, local


def step_layers(
    made: Preconditioner,
    samples: dict[str, RowSamples],
    terms: Tensor | float,
    shards: Shards | None,
    rounding: Rounding,
    lr: float | Tensor,
    decay: float,
    step: int,
    bias_share: float | Tensor = 1.0,
) -> None:
    """W ← W − lr · decay · W − update, of every layer that has a gradient.

    Args:
        made: the banks.
        samples, terms: rows for Eq. 12-13 and T, see `LayerBank.update`.
        shards: where the rows of weights are, if they are sharded.
        rounding: of bfloat16 weights.
        lr, decay: of the layers' group.
        step: number of the step.
        bias_share: by what the part of an update that is a bias's is multiplied, see `groups.bias_share`.
    """
    if shards is None:
        _step_whole(made, samples, terms, rounding, lr, decay, step, bias_share)
    else:
        _step_sharded(made, samples, terms, shards, rounding, lr, decay, step, bias_share)


def _step_whole(made: Preconditioner, samples: dict[str, RowSamples], terms: Tensor | float, rounding: Rounding,
                lr: float | Tensor, decay: float, step: int, bias_share: float | Tensor) -> None:  # fmt: skip
    for bank in made.layer_banks:
        present = [i for i, layer in enumerate(bank.layers) if layer.weight.grad is not None]
        if not present:
            continue
        layers = [bank.layers[i] for i in present]
        grad = torch.cat([layer.gradient(bank.momentum.dtype) for layer in layers])
        updates = bank.update(grad, present, lr, step, samples, terms)
        with rounding.full([layer.weight for layer in layers]) as whole:
            if decay:
                torch._foreach_mul_(whole, 1 - lr * decay)
            torch._foreach_sub_(whole, [layer.like_weight(u) for layer, u in zip(layers, updates, strict=True)])
        biases = [(y.bias, y.like_bias(u)) for y, u in zip(layers, updates, strict=True) if y.bias is not None]
        with rounding.full([bias for bias, _ in biases]) as whole:
            for value, (_, change) in zip(whole, biases, strict=True):
                value.sub_(change * bias_share)


def _step_sharded(made: Preconditioner, samples: dict[str, RowSamples], terms: Tensor | float, shards: Shards,
                  rounding: Rounding, lr: float | Tensor, decay: float, step: int,
                  bias_share: float | Tensor) -> None:  # fmt: skip
    """Gradients go whole to the owner of each layer, updates come back as rows: two collectives in all."""
    owners = made.owners
    assert owners is not None
    present = [layer for bank in made.layer_banks for layer in bank.members if layer.weight.grad is not None]
    places: dict[tuple[str, str], int] = {}
    parameters: list[nn.Parameter] = []
    for layer in present:
        for kind, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            if parameter is not None:
                places[layer.name, kind] = len(parameters)
                parameters.append(parameter)
    ranks = [owners.of_layer[name] for name, _ in places]
    shapes = [p.shape for p in parameters]
    grads = shards.collect([local(gradient_of(p)) for p in parameters], shapes, ranks)
    changes: list[Tensor | None] = [None] * len(parameters)
    for bank in made.layer_banks:
        mine = [i for i, layer in enumerate(bank.layers) if layer.weight.grad is not None]
        if not mine:
            bank.wait_for_others(samples, terms)
            continue
        layers = [bank.layers[i] for i in mine]
        grad = torch.cat([_matrices(layer, grads, places, bank.momentum.dtype) for layer in layers])
        updates = bank.update(grad, mine, lr, step, samples, terms)
        for layer, update in zip(layers, updates, strict=True):
            changes[places[layer.name, "weight"]] = layer.like_weight(update)
            if layer.bias is not None:
                changes[places[layer.name, "bias"]] = layer.like_bias(update) * bias_share
    with rounding.full(parameters) as rows:
        updates = shards.spread(changes, rows, shapes, ranks)
        if decay:
            torch._foreach_mul_([rows[i] for (_, kind), i in places.items() if kind == "weight"], 1 - lr * decay)
        torch._foreach_sub_(rows, updates)


def _matrices(layer: Layer, grads: list[Tensor], places: dict[tuple[str, str], int], dtype: torch.dtype) -> Tensor:
    bias = places.get((layer.name, "bias"))
    return layer.matrices(grads[places[layer.name, "weight"]], None if bias is None else grads[bias], dtype)
