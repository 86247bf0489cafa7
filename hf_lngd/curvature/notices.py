"""What is said once, by name: a layer or parameter that training treats otherwise than its user may expect."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

logger = logging.getLogger("hf_lngd")


class Notices:
    """Warnings on the logger ``hf_lngd``, each name once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def late_layer(self, name: str) -> None:
        """A layer that the first factor step did not see is called: what follows it was never looked for."""
        if self._is_new(f"layer {name}"):
            logger.warning(
                "LNGD: layer '%s' is called for the first time after the first factor step. What follows it is not "
                "known and counts as the identity (φ' = 1), and it shares no factor. To have it looked at: call every "
                "layer in the first step, or make LNGD anew",
                name,
            )

    def strangers(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Parameters of the model that have a gradient and are in no parameter group."""
        known = set(trained)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter not in known and self._is_new(f"parameter {name}"):
                logger.warning(
                    "LNGD: parameter '%s' has a gradient and is not trained: it was frozen, or no part of the model, "
                    "when LNGD was made. To have it trained: optimizer.add_param_group({'params': [...]}) (AdamW), or "
                    "make LNGD anew",
                    name,
                )

    def _is_new(self, key: str) -> bool:
        new = key not in self._told
        self._told.add(key)
        return new
