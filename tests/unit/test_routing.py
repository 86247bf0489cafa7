"""Each parameter has one owner and a reason, and stands in one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MarianMTModel

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.routing import FALLBACK_OWNER, LNGD_OWNER, format_rates, format_routes, route
from tests.helpers import marian_batch, tiny_marian


def test_what_checkpoints_leave_out_is_not_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`from_pretrained` makes sinusoidal positions want a gradient, and `save_pretrained` leaves them out."""
    tiny_marian().save_pretrained(tmp_path)
    model = MarianMTModel.from_pretrained(tmp_path).double()
    names = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    before = []
    for name in names:
        before.append(model.get_parameter(name).requires_grad_().detach().clone())
    optimizer = LNGD(model, lr=1e-2)
    assert all(routes(model)[name] == ("frozen", "left out of checkpoints") for name in names)
    for seed in range(2):
        model(**marian_batch(seed)).loss.backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(n), old) for n, old in zip(names, before, strict=True))
    assert not caplog.records


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


def routes(model: nn.Module, **fields: Any) -> dict[str, tuple[str, str]]:
    return {r.parameter: (r.owner, r.reason) for r in route(model, LNGDConfig(**fields)).routes}


def test_owners_and_reasons() -> None:
    found = routes(Zoo())
    assert found["linear.weight"] == ("lngd", "linear")
    assert found["linear.bias"] == ("fallback", "bias")
    assert found["head.weight"] == ("lngd", "linear")
    assert found["tokens.weight"] == ("lngd", "embedding, exact")
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
    assert routes(Zoo(), embedding="fallback")["tokens.weight"] == ("fallback", "embedding")
    excluded = routes(Zoo(), exclude=r"^head\.|linear", bias="factor")
    assert excluded["head.weight"] == excluded["linear.weight"] == ("fallback", "excluded")
    assert excluded["linear.bias"][0] == "fallback"


def test_tied_weights_have_one_owner() -> None:
    found = routes(tiny_marian())
    assert found["model.shared.weight"] == ("lngd", "embedding, exact")
    assert not any("lm_head" in name for name in found)
    two = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    two["b"].weight = two["a"].weight
    routing = route(two, LNGDConfig())
    (layer,) = routing.layers
    assert {r.parameter for r in routing.routes} == {"a.weight", "a.bias", "b.bias"}
    assert [name for name, _ in layer.modules] == ["a", "b"]


# The routing table


def test_table_adds_up() -> None:
    optimizer = LNGD(Zoo())
    text = optimizer.routing_table()
    assert text == f"{format_routes(optimizer.routing())}\n\n{format_rates(optimizer.param_groups)}"
    lines = text.splitlines()
    assert lines[0].split() == ["owner", "reason", "tensors", "parameters", "share", "for", "example"]
    assert [line.split()[0] for line in lines[1:6]] == ["lngd"] * 5 and "linear.weight" in lines[5]
    assert sum(r.numel for r in optimizer.routing()) == sum(p.numel() for p in Zoo().parameters())
    rows = [line.split() for line in lines[1:] if line[:1] in "lf" and "%" in line]
    assert sum(int(row[row.index("%") - 3]) for row in rows) == len(list(Zoo().parameters()))


def test_rates_below_the_table_are_those_of_the_groups() -> None:
    entry = {"params": "^linear", "weight_decay": 0.2, "name": "mine"}
    optimizer = LNGD(Zoo(), lr=1e-3, fallback_lr_scale=0.5, param_groups=[entry])
    text = optimizer.routing_table().splitlines()[-1]
    assert text.startswith("Rates: lngd 1 × lr, weight decay 1.5 (none below 0.5 of the first norm); ")
    for said in ("mine.lngd 1 × lr, weight decay 0.2", "fallback 0.5 × lr, weight decay 0.1"):
        assert f"; {said}; " in text
    assert "fallback_no_decay 0.5 × lr, no weight decay" in text


# Biases in factors


class Head(nn.Module):
    """A head with a bias, tied to the embedding as BERT's is."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.linear, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.tokens(ids)))


def all_move(model: nn.Module, optimizer: LNGD, x: torch.Tensor) -> bool:
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    optimizer.step()
    return not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_bias_needs_a_weight_of_its_own_to_be_in_the_factor() -> None:
    model = Head()
    found = routes(model, bias="factor")
    assert found["head.bias"] == ("fallback", "bias") and found["linear.bias"] == ("lngd", "bias in the factor")
    assert all_move(model, LNGD(model, bias="factor"), torch.arange(6)[None])
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = two[0].weight
    found = routes(two, bias="factor")
    assert found["0.bias"] == found["1.bias"] == ("fallback", "bias")


def test_a_bias_may_come_before_its_weight() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight.detach()
    del model.weight
    model.weight = nn.Parameter(weight)  # as removing a parametrization does
    routing = route(model, LNGDConfig(bias="factor"))
    assert [r.parameter for r in routing.routes] == ["bias", "weight"]
    (layer,) = routing.layers
    assert (layer.weight_name, layer.bias_name, layer.columns) == ("weight", "bias", 4)
    assert all_move(model, LNGD(model, bias="factor"), torch.randn(5, 3))


# What cannot be trained


def test_parameters_that_cannot_be_trained_here() -> None:
    half, sparse, split = nn.Linear(3, 2).half(), nn.Embedding(3, 2, sparse=True), nn.Linear(3, 2)
    split.weight.ds_id = 0
    lazy, complex_ = nn.LazyLinear(3), nn.Linear(3, 2, dtype=torch.complex64)
    for model, error, told in (
        (half, ValueError, "weight: got a weight of torch.float16, whose updates are lost below 6e-8, accepted: "),
        (sparse, ValueError, "weight: got an embedding with sparse=True, accepted: sparse=False"),
        (split, RuntimeError, "LNGD: parameter 'weight' is one that DeepSpeed"),
        (lazy, ValueError, "weight: got a parameter without a shape yet, accepted: a model that was called once"),
        (complex_, ValueError, "weight: got torch.complex64, accepted: real numbers"),
    ):
        with pytest.raises(error, match=told.replace("(", r"\(")):
            route(model, LNGDConfig())
    for model in (half, sparse, complex_):
        assert {owner for owner, _ in routes(model.requires_grad_(False)).values()} == {"frozen"}


def test_output_layers_over_a_vocabulary_are_adamws() -> None:
    """Those that transformers' models name, of any size, and linear layers of such a shape; no classifier's head."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=False))
    plain = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1000), nn.Linear(8, 512), nn.Linear(64, 1024))
    reasons = {}
    for model in (llama, plain):
        reasons |= {r.parameter: (r.owner, r.reason) for r in route(model, LNGDConfig()).routes}
    adamw = (FALLBACK_OWNER, "output layer over a vocabulary")
    assert reasons["lm_head.weight"] == reasons["3.weight"] == adamw
    assert all(reasons[f"{i}.weight"][0] == LNGD_OWNER for i in range(3))
    assert reasons["model.layers.0.mlp.up_proj.weight"] == (LNGD_OWNER, "linear")
