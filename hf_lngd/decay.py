"""Weight decay of LNGD's layers where none was given. A rate of decay that helps in a short run shrinks weights to
nothing in a long one, whose updates are small: that of a layer ends at a share of the norm that its weights had when
training began. Weights that updates make grow decay as they do anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .adamw import States
from .linalg import squared_norms
from .torch_internals import local

# Decay fades from this multiple of the floor on. Earlier it costs: on Multi30k from scratch, whose first weights are
# too large, a fade from the first norm on 0.03.
FADES_FROM = 1.2
# Keys in the state.
NORMS = FIRST, LAST = "first_norm", "last_norm"


class FadingDecay:
    """The share of its decay that each weight takes; norms stand in the optimizer's state, so that a resumed run goes
    on as it would have."""

    def __init__(self) -> None:
        self._shares: dict[nn.Parameter, float] = {}

    def measure(self, weights: Sequence[nn.Parameter], states: States, layout: Any) -> None:
        """Look at the norms of these weights; waits for the device. Layout *rows*: a collective."""
        self._shares.clear()
        if not weights or weights[0].is_meta:  # which has no norms
            return
        (squares,) = layout.complete([squared_norms([local(weight.detach()) for weight in weights])])
        for weight, norm in zip(weights, squares.sqrt().cpu(), strict=True):
            state = states[weight]
            state.setdefault(FIRST, norm.clone())
            state[LAST] = norm.clone()

    def forget(self) -> None:
        """The state was loaded, or taken away."""
        self._shares.clear()

    def share(self, weight: nn.Parameter, floor: float, states: States) -> float:
        """1, and less from `FADES_FROM` · `floor` of the first norm on; 0 at `floor`."""
        if weight not in self._shares:
            state = states[weight]
            first, last = (float(state[key]) if key in state else 0.0 for key in (FIRST, LAST))
            left = (last / first / floor - 1) / (FADES_FROM - 1) if first > 0 else 1.0
            self._shares[weight] = min(max(left, 0.0), 1.0)
        return self._shares[weight]
