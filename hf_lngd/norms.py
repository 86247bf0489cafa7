"""The norms of layers' weights, when training began and at the last factor step: they say where weight decay ends, and
how large a step is beside the weights.

Where no weight decay is given, a rate of decay that helps in a short run would shrink weights to nothing in a long one,
whose updates are small: that of a layer ends at a share of its first norm. Weights that updates make grow decay as they
do anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adamw import States
from .layers import Layer
from .linalg import squared_norms
from .torch_internals import local

# Decay fades from this multiple of the floor on. Earlier it costs: on Multi30k from scratch, whose first weights are
# too large, a fade from the first norm on 0.03.
FADES_FROM = 1.2
# Keys in the state.
NORMS = FIRST, LAST = "first_norm", "last_norm"


def measure(weights: Sequence[nn.Parameter], states: States, layout: Any) -> None:
    """Write the norms of these weights into their state, so that a resumed run goes on as it would have; waits for the
    device. Layout *rows*: a collective."""
    if not weights or weights[0].is_meta:  # which has no norms
        return
    (squares,) = layout.complete([squared_norms([local(weight.detach()) for weight in weights])])
    for weight, norm in zip(weights, squares.sqrt().cpu(), strict=True):
        state = states[weight]
        state.setdefault(FIRST, norm.clone())
        state[LAST] = norm.clone()


def left_of(weight: nn.Parameter, states: States) -> float:
    """What a weight has left of its first norm; infinity where that is 0, or not known."""
    first, last = (float(states[weight].get(key, 0.0)) for key in NORMS)
    return last / first if first > 0 else math.inf


def decay_share(left: float, floor: float) -> float:
    """Of its decay what a weight takes: 1, and less from `FADES_FROM` · `floor` of its first norm on; 0 at `floor`."""
    return min(max((left / floor - 1) / (FADES_FROM - 1), 0.0), 1.0)


def first_rms(layers: Sequence[Layer], states: States) -> Tensor:
    """[n], root mean square of their weights when training began; 0 where it was not measured."""
    found = [float(states[y.weight].get(FIRST, 0.0)) / y.weight.numel() ** 0.5 for y in layers]
    like = layers[0].like
    return torch.tensor(found, dtype=like.dtype).to(like.device, non_blocking=True)
