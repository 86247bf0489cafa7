"""Each parameter has one owner and a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_helpers import core_marian
from torch import nn

from hf_lngd import LNGD
from hf_lngd.routing import format_rates, format_routes


class Zoo(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.position_embeddings = nn.Embedding(9, 4)
        self.position_bias = nn.Parameter(torch.zeros(3, 3))
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.grouped, self.depthwise = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4)
        self.transposed = nn.ConvTranspose1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.strange = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 9, bias=False)


def routes(model: nn.Module, **fields: object) -> dict[str, tuple[str, str]]:
    return {r.parameter: (r.owner, r.reason) for r in LNGD(model, **fields).routing()}


def test_owners_and_reasons() -> None:
    found = routes(Zoo())
    assert found["linear.weight"] == ("lngd", "linear")
    assert found["linear.bias"] == ("fallback", "bias")
    assert found["head.weight"] == ("lngd", "linear")
    assert found["tokens.weight"] == ("fallback", "embedding, rotated")
    assert found["position_embeddings.weight"] == ("fallback", "position")
    assert found["position_bias"] == ("fallback", "position")
    assert found["frozen.weight"] == found["frozen.bias"] == ("frozen", "frozen")
    assert found["norm.weight"] == found["norm.bias"] == ("fallback", "norm")
    assert found["conv.weight"] == ("lngd", "convolution")
    assert found["grouped.weight"] == ("lngd", "grouped convolution")
    assert found["depthwise.weight"] == ("lngd", "depthwise convolution")
    assert found["transposed.weight"] == ("fallback", "unsupported module ConvTranspose1d")
    assert found["attention.in_proj_weight"] == ("fallback", "unsupported module MultiheadAttention")
    assert found["attention.out_proj.weight"][0] == "fallback"
    assert found["strange.parametrizations.weight.original1"][0] == "fallback"
    assert found["scale"] == ("fallback", "vector")


def test_choices_move_parameters() -> None:
    assert routes(Zoo(), bias="factor")["linear.bias"] == ("lngd", "bias in the factor")
    assert routes(Zoo(), embedding="exact")["tokens.weight"] == ("lngd", "embedding, exact")
    assert routes(Zoo(), embedding="fallback")["tokens.weight"] == ("fallback", "embedding")
    excluded = routes(Zoo(), exclude=r"^head\.|linear", bias="factor")
    assert excluded["head.weight"] == excluded["linear.weight"] == ("fallback", "excluded")
    assert excluded["linear.bias"][0] == "fallback"


@pytest.mark.parametrize("embedding", ["fallback", "rotated", "exact"])
def test_every_parameter_once_and_in_one_group(embedding: str) -> None:
    model = Zoo()
    optimizer = LNGD(model, embedding=embedding, bias="factor", weight_decay=0.3)
    assert [r.parameter for r in optimizer.routing()] == [name for name, _ in model.named_parameters()]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert p.dim() > 1 or group["weight_decay"] == 0
    norms = {id(p) for p in model.norm.parameters()}
    assert not any(id(p) in norms and g["weight_decay"] for g in optimizer.param_groups for p in g["params"])


def test_rates_of_the_groups() -> None:
    rates = {g["name"]: g["lr"] for g in LNGD(Zoo(), lr=0.5, fallback_lr_scale=3.0, bias="factor").param_groups}
    assert rates == {
        "lngd": 0.5, "lngd_bias": 0.5, "embedding": 1.5, "fallback": 1.5, "fallback_no_decay": 1.5,
    }  # fmt: skip
    assert {g["lr"] for g in LNGD(Zoo(), lr=0.5, fallback_lr=0.1).param_groups} == {0.5, 0.1}


def test_tied_weights_have_one_owner() -> None:
    model = core_marian()
    found = routes(model)
    assert found["model.shared.weight"] == ("fallback", "embedding, rotated")
    assert not any("lm_head" in name for name in found)
    two = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    two["b"].weight = two["a"].weight
    assert routes(two)["a.weight"] == ("lngd", "linear")


def test_wide_embeddings_are_not_rotated() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(3, 2049), nn.Linear(3, 3)

    assert routes(Wide())["table.weight"] == ("fallback", "embedding, too wide to rotate")


def test_table_adds_up() -> None:
    optimizer = LNGD(Zoo())
    text = optimizer.routing_table()
    assert text == f"{format_routes(optimizer.routing())}\n\n{format_rates(optimizer.config)}"
    lines = text.splitlines()
    assert lines[0].split() == ["owner", "reason", "tensors", "parameters", "share", "for", "example"]
    assert [line.split()[0] for line in lines[1:5]] == ["lngd"] * 4 and "linear.weight" in lines[4]
    assert sum(r.numel for r in optimizer.routing()) == sum(p.numel() for p in Zoo().parameters())


@pytest.mark.parametrize(
    ("fields", "rest"),
    [({}, "3 × lr, weight decay 0.1"), ({"fallback_lr": 0.02}, "0.02, weight decay 0.1"),
     ({"preset": "paper"}, "1 × lr, weight decay 0.004")],
)  # fmt: skip
def test_rates_below_the_table_are_those_of_the_groups(fields: dict[str, Any], rest: str) -> None:
    optimizer = LNGD(Zoo(), lr=1e-3, **fields)
    groups = {group["name"]: group for group in optimizer.param_groups}
    text = optimizer.routing_table().splitlines()[-1]
    own, others = groups["lngd"], groups["embedding" if "embedding" in groups else "fallback"]
    assert own["lr"] == 1e-3 and f"Rate of LNGD's layers: lr, weight decay {own['weight_decay']:g}. " in text
    assert f"Of all else: {rest};" in text
    assert others["lr"] == pytest.approx(0.02 if "fallback_lr" in fields else 1e-3 * float(rest.split()[0]))
    assert others["weight_decay"] == optimizer.config.weight_decay


class Head(nn.Module):
    """A head with a bias, tied to the embedding as BERT's is."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.linear, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.tokens(ids)))


def test_a_bias_needs_a_weight_of_its_own_to_be_in_the_factor() -> None:
    model = Head()
    optimizer = LNGD(model, bias="factor")
    found = {r.parameter: (r.owner, r.reason) for r in optimizer.routing()}
    assert found["head.bias"] == ("fallback", "bias") and found["linear.bias"] == ("lngd", "bias in the factor")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(6)[None]).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = two[0].weight
    found = routes(two, bias="factor")
    assert found["0.bias"] == found["1.bias"] == ("fallback", "bias")


def test_a_bias_may_come_before_its_weight() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight.detach()
    del model.weight
    model.weight = nn.Parameter(weight)  # as removing a parametrization does
    optimizer = LNGD(model, bias="factor")
    assert [r.parameter for r in optimizer.routing()] == ["bias", "weight"]
    (layer,) = optimizer._routing.layers
    assert (layer.weight_name, layer.bias_name, layer.columns) == ("weight", "bias", 4)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
