"""docs/extending.md: its code runs, and a layer type that was added steps as `nn.Linear` does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lngd import LNGD
from hf_lngd.curvature.layers import Geometry, add_layer_type

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """What the page's code defines, its layer type added."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    yield names
    add_layer_type(names["HeadProjection"], None)


class Net(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection, self.act, self.out = projection, nn.Tanh(), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.projection(x)))


def trained(model: Net, **fields: Any) -> tuple[LNGD, torch.Tensor, torch.Tensor]:
    optimizer = LNGD(model, lr=0.05, factor_interval=2, **fields)
    for step in range(4):
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (model(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    projection: Any = model.projection
    return optimizer, projection.weight.detach(), projection.bias.detach()


@pytest.mark.parametrize("fields", [{}, {"preset": "paper"}, {"family": "kfac"}, {"direction": "gram"}], ids=str)
def test_the_page_steps_as_a_linear_layer(page: dict[str, Any], fields: dict[str, Any]) -> None:
    own = Net(page["HeadProjection"](8, 2, 3)).double()
    linear = Net(nn.Linear(8, 6)).double()
    with torch.no_grad():
        linear.projection.weight.copy_(own.projection.weight.flatten(0, 1))
        linear.projection.bias.copy_(own.projection.bias)
    optimizer, weight, bias = trained(own, **fields)
    _, expected, expected_bias = trained(linear, **fields)
    assert ("lngd", "linear") in {(r.owner, r.reason) for r in optimizer.routing() if r.layer == "projection"}
    # the same numbers in another order of summation: einsum's
    torch.testing.assert_close(weight.flatten(0, 1), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-9, atol=1e-12)


def test_without_it_the_type_is_named(page: dict[str, Any]) -> None:
    add_layer_type(page["HeadProjection"], None)
    add_layer_type(page["HeadProjection"], None)  # taken out already
    routes = {r.parameter: r.reason for r in LNGD(Net(page["HeadProjection"](8, 2, 3))).routing()}
    assert routes["projection.weight"] == "unsupported module HeadProjection"


def test_a_type_is_meant_itself_and_may_decline(page: dict[str, Any]) -> None:
    class Sub(page["HeadProjection"]):
        pass

    routes = {r.parameter: r.reason for r in LNGD(Net(Sub(8, 2, 3))).routing()}
    assert routes["projection.weight"] == "unsupported module Sub"
    add_layer_type(page["HeadProjection"], lambda module: None)
    routes = {r.parameter: r.reason for r in LNGD(Net(page["HeadProjection"](8, 2, 3))).routing()}
    assert routes["projection.weight"] == "unsupported module HeadProjection"


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("linear", 1, 6, 9),
        Geometry("linear", 1, 3, 16),
        Geometry("linear", 2, 3, 8),
        Geometry("transposed", 1, 6, 8),
        Geometry("convolution", 1, 6, 8),
    ],
    ids=str,
)
def test_a_geometry_that_does_not_fit_is_refused(page: dict[str, Any], geometry: Geometry) -> None:
    add_layer_type(page["HeadProjection"], lambda module: geometry)
    with pytest.raises(ValueError, match=r"add_layer_type: HeadProjection: got .* for a weight \[2, 3, 8\] and a bias"):
        LNGD(Net(page["HeadProjection"](8, 2, 3)))
