"""Which samples of a batch the factors of convolutions are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.capture import CONVOLUTION_SAMPLES
from tests.helpers import factors_of, seeded
from tests.reference import factors
from tests.unit.convolutions import patches_of

SPLITS = [[20], [5, 5, 5, 5], [3, 9, 1, 7], [1] * 20]


class Image(nn.Module):
    """Two convolutions, one of them grouped, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 2, groups=2, bias=False)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(torch.tanh(self.first(x))).mean((2, 3)))


def model_and_images() -> tuple[Any, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return seeded(Image).double(), torch.randn(20, 3, 5, 5, generator=draw, dtype=torch.float64)


def captured(model: nn.Module, x: Tensor, sizes: list[int], **fields: Any) -> LNGD:
    """An optimizer after two steps with this batch in micro-batches, which leave the weights as they are."""
    optimizer = LNGD(model, lr=0.0, factor_interval=1, **fields)
    for _ in range(2):
        for part in x.split(sizes):
            (model(part).square().sum() / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return optimizer


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_convolutions_see_one_sample_in_eight_of_a_step(sizes: list[int]) -> None:
    """The first, the ninth and so on, counted over the micro-batches; linear layers see them all."""
    model, x = model_and_images()
    found, some = captured(model, x, sizes), x[::CONVOLUTION_SAMPLES]
    assert len(some) == 3
    with torch.no_grad():
        inputs = torch.tanh(model.first(some))
        last = model.grouped(torch.tanh(model.first(x))).mean((2, 3))
    a = patches_of(model.first, some)[0].detach()
    torch.testing.assert_close(found.factors("first")["phi"], factors(a, torch.ones(len(a), 4))[0])
    for unit, a in enumerate(patches_of(model.grouped, inputs).detach()):
        torch.testing.assert_close(found.factors("grouped")["phi"][unit], factors(a, torch.ones(len(a), 2))[0])
    torch.testing.assert_close(found.factors("head")["phi"], factors(last, torch.ones(20, 2))[0])


@pytest.mark.parametrize("fields", [{"direction": "natural"}, {"family": "kfac"}], ids=str)
def test_the_papers_methods_see_every_sample(fields: dict[str, Any]) -> None:
    model, x = model_and_images()
    found = captured(model, x, [20], **fields)
    of_units = found.factors("grouped")
    inputs = torch.tanh(model.first(x)).detach()
    for unit, a in enumerate(patches_of(model.grouped, inputs).detach()):
        if "family" in fields:
            torch.testing.assert_close(of_units["a"][unit], a.T @ a / len(a))
        else:
            torch.testing.assert_close(of_units["phi"][unit], factors(a, torch.ones(len(a), 2))[0])


def test_each_step_counts_its_samples_anew() -> None:
    """So that a step of a single image has factors of it."""
    model, x = model_and_images()
    optimizer = LNGD(model, lr=0.0, factor_interval=1)
    for image in x[:3].split(1):
        model(image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    a = [patches_of(model.first, image)[0].detach() for image in x[:3].split(1)]
    decay = optimizer.config.ema_decay
    weights = [decay ** (2 - i) for i in range(3)]
    phi = sum(w * factors(rows, torch.ones(len(rows), 4))[0] for w, rows in zip(weights, a, strict=True)) / sum(weights)
    torch.testing.assert_close(factors_of(optimizer)["first.phi"], phi)
