"""Which layout is chosen. What each of them does: tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_lngd import LNGDConfig
from hf_lngd.parallel.layout import make_layout, owned_pays
from hf_lngd.routing import route


@pytest.mark.parametrize(("width", "size", "pays"), [(8, 2, False), (512, 2, True), (512, 1, False)])
def test_few_or_small_layers_stay_where_they_are(width: int, size: int, pays: bool) -> None:
    layers = route(nn.Sequential(*[nn.Linear(width, width) for _ in range(4)]), LNGDConfig()).layers
    assert owned_pays(layers, size) is pays
    assert not owned_pays([], size)


@pytest.mark.parametrize("fields", [{"momentum_on": "update"}, {"rate": "adaptive"}, {"family": "ekfac"}], ids=str)
def test_owned_is_refused_where_every_layer_is_needed_everywhere(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layout: got 'owned', accepted: whole, for momentum_on=update"):
        make_layout("owned", LNGDConfig(**fields), [], None)
    assert make_layout("auto", LNGDConfig(**fields), [], None).name == "whole"


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match="layout: got 'rows', accepted: whole, owned, auto"):
        make_layout("rows", LNGDConfig(), [], None)
    assert make_layout("auto", LNGDConfig(), [], None).name == make_layout("whole", LNGDConfig(), [], None).name
