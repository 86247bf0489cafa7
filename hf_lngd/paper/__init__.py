"""The published algorithm and its rivals: sampled, true and empirical Fishers, the natural direction with a diagonal Ψ,
Eq. 12-13, KFAC, EKFAC, TKFAC, NG+. Imported when an option asks for any of it."""

from __future__ import annotations

from ..config import LNGDConfig
from ..directions import Direction, Polar
from ..method import Method
from ..topology import Group
from . import natural, rate
from .capture import PaperCapture
from .families import family_banks


def method_of(config: LNGDConfig) -> Method:
    """The method of options that are not the default's."""
    direction: Direction = Polar(config) if config.direction == "polar" else natural.Natural(config)
    rates = rate.rates if config.rate == "adaptive" else None
    if config.family != "lngd":
        return Method(PaperCapture, direction, lambda specs: family_banks(specs, config), lambda group, m: 1.0, rates)

    def scale(group: Group, m: int) -> float:
        return 1.0 if natural.estimates_psi(group.follows, config.fisher) else float(m)

    return Method(PaperCapture, direction, lambda specs: natural.banks(specs, direction.factor, config), scale, rates)
