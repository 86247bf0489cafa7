"""Who shares a factor, what follows whom, which mask applies."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.masks import OPEN
from hf_lngd.topology import Group, Topology
from tests.helpers import factors_of, marian_batch, seeded, tiny_marian, train_step
from tests.hf_helpers import hf_seq2seq_model, hf_tokenizer
from tests.reference import factors

Found = dict[str, tuple[list[str], tuple[str, ...], str | None]]


def groups(optimizer: LNGD) -> Found:
    return {g.name: (g.members, g.follows, g.source) for g in optimizer.core.capture.topology.groups}


# By itself


def sample() -> Topology:
    topology = Topology()
    topology.enter(Group(["q", "k"], (), "inputs"))
    topology.enter(Group(["fc"], ("ReLU",)))
    return topology


def test_there_and_back_through_json() -> None:
    topology = sample()
    assert not topology.frozen and {name: g.name for name, g in topology.of_layer.items()} == {
        "q": "q", "k": "q", "fc": "fc",
    }  # fmt: skip
    topology.freeze(["q", "k", "fc", "never"])
    again = Topology.from_state(json.loads(json.dumps(topology.state())))
    assert again == topology and again.frozen and again.unseen == {"never"}
    assert again.of_layer["never"].source == OPEN


def test_what_processes_saw_becomes_one_order() -> None:
    mine, theirs = sample(), Topology()
    theirs.enter(Group(["late"], (), "targets"))
    theirs.enter(Group(["q", "k", "v"], (), "inputs"))
    found = Topology.common([mine.state(), theirs.state()])
    assert [g.members for g in found.groups] == [["q", "k", "v"], ["fc"], ["late"]] and not found.frozen
    found.freeze(["q", "k", "v", "fc", "late", "never"])
    again = Topology.common([found.state(), mine.state()])  # what was never called tells nothing
    assert "never" not in again.of_layer
    assert found.without(["never", "q"]) == again and found.unseen == {"never"}


def test_unshared_is_each_layer_by_itself() -> None:
    assert [g.members for g in Topology.unshared(["a", "b"]).groups] == [["a"], ["b"]]


# In models


@pytest.mark.parametrize("fisher", ["expected", "sampled", "empirical", "true"])
def test_sides_of_equal_length_are_told_apart(fisher: str) -> None:
    model, batch = tiny_marian(), marian_batch(source=7, target=7)
    optimizer = LNGD(model, lr=1e-3, fisher=fisher)
    train_step(model, optimizer, batch)
    for members, _, source in groups(optimizer).values():
        for name in members:
            reads_encoder = ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
            assert source == ("inputs" if reads_encoder else "targets"), name


@pytest.mark.parametrize("target", [6, 7], ids=["unlike lengths", "equal lengths"])
@pytest.mark.parametrize("direction", ["polar", "natural"])
def test_marian_shares_what_it_reads_together(direction: str, target: int) -> None:
    model = tiny_marian(decoder_layers=2)
    optimizer = LNGD(model, lr=1e-3, direction=direction)
    train_step(model, optimizer, marian_batch(source=7, target=target))
    found = groups(optimizer)
    encoder, decoder = "model.encoder.layers.0", "model.decoder.layers.{}"
    qkv = [f"{encoder}.self_attn.{name}_proj" for name in ("q", "k", "v")]
    assert (sorted(found[qkv[0]][0]), found[qkv[0]][1:]) == (sorted(qkv), ((), "inputs"))
    cross = [f"{decoder.format(i)}.encoder_attn.{name}_proj" for i in (0, 1) for name in ("k", "v")]
    assert sorted(found[cross[0]][0]) == sorted(cross) and found[cross[0]][2] == "inputs"
    query = f"{decoder.format(1)}.encoder_attn.q_proj"
    assert found[query] == ([query], (), "targets")
    assert found[f"{encoder}.fc1"][1] == (("ReLU",) if direction == "natural" else ())
    after = ("dropout", "sum", "layer_norm") if direction == "natural" else ()  # Marian's norms come last
    assert found[f"{encoder}.fc2"][1:] == (after, "inputs")
    assert sum(len(members) for members, _, _ in found.values()) == len(optimizer.core.capture.layers)


@pytest.mark.parametrize("family", ["t5", "bart", "mbart", "m2m100"])
def test_other_families(family: str) -> None:
    model = hf_seq2seq_model(family, hf_tokenizer()).double().train()
    optimizer = LNGD(model, lr=1e-3, direction="natural")
    batch = marian_batch(source=6, target=6)
    batch = {key: value % 9 if key == "input_ids" else value for key, value in batch.items()}
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 9)
    train_step(model, optimizer, batch)
    found = groups(optimizer)
    sources = {name: source for name, (_, _, source) in found.items()}
    assert all(source == "inputs" for name, source in sources.items() if "encoder." in name.split("decoder")[0])
    assert max(len(members) for members, _, _ in found.values()) == 3
    activated = [name for name, (_, follows, _) in found.items() if len(follows) == 1 and "norm" not in follows[0]]
    assert len(activated) == 2 and all(name.endswith(("fc1", "wi")) for name in activated)


class Widths(nn.Module):
    """Two heads of unlike width on one tensor, as grouped queries have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return self.q(x).sum() + self.k(x).sum()


def test_unlike_widths_share_unless_the_damping_depends_on_them() -> None:
    x = torch.randn(5, 4)
    for damping, count in ((1.0, 1), ("paper", 2)):
        model = Widths()
        optimizer = LNGD(model, lr=1e-3, damping=damping, direction="natural")
        model(x).backward()
        optimizer.step()
        assert len(groups(optimizer)) == count
        ratio = optimizer.factors("q")["phi"] / optimizer.factors("k")["phi"]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


def test_layers_with_and_without_a_bias_do_not_share_a_factor_that_holds_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for bias, count in (("fallback", 1), ("factor", 2)):
        model = Widths().double()
        model.k = nn.Linear(4, 4).double()
        optimizer = LNGD(model, lr=1e-3, bias=bias)
        model(x).backward()
        optimizer.step()
        assert len(groups(optimizer)) == count
        a = x if bias == "fallback" else torch.cat((x, torch.ones(5, 1).double()), 1)
        torch.testing.assert_close(optimizer.factors("q")["phi"], factors(x, torch.ones(5, 4))[0])
        torch.testing.assert_close(optimizer.factors("k")["phi"], factors(a, torch.ones(5, 4))[0])


class Dropped(nn.Module):
    """Queries and keys read one tensor; layerdrop may leave both out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.drops = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x if self.drops else torch.relu(self.q(x)) * self.k(x))


@pytest.mark.parametrize("fields", [{}, {"preset": "paper", "fisher": "expected", "rate": "rms"}], ids=str)
def test_layers_that_the_first_step_left_out_are_placed_later(
    fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for first in (True, False):
        model = seeded(Dropped).double()
        optimizer = LNGD(model, lr=0.0, **{**fields, "factor_interval": 1, "ema_decay": 0.0})
        for model.drops in (first, False):
            model(torch.ones(3, 4, dtype=torch.float64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(({g: sorted(m[0]) for g, m in groups(optimizer).items()}, factors_of(optimizer)))
        assert not caplog.messages
    assert found[0][0] == found[1][0]
    phis = [{name: value for name, value in own.items() if name.endswith("phi")} for _, own in found]
    assert all(torch.equal(value, phis[1][name]) for name, value in phis[0].items())
