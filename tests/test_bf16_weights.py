"""Weights of bfloat16: the state is float32, small updates add up, whatever owns the weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.curvature.rounding import Rounding, rest_of, round_at_random

BF16 = torch.bfloat16
OWNERS: list[dict[str, Any]] = [
    {},
    {"bias": "factor", "direction": "gram"},
    {"embedding": "exact", "momentum_on": "update", "rate_scale": 0.2, "fallback_lr": 5e-4},
    {"embedding": "fallback", "family": "kfac", "rate": "rms"},
]


class Words(nn.Module):
    """Every kind of owner; all weights begin at 1 or −1, where bfloat16 has steps of 2⁻⁸ inwards."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table, self.inner, self.norm, self.outer = (
            nn.Embedding(6, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )
        for p in self.parameters():
            p.data = torch.randint(0, 2, p.shape, generator=draw).float() * 2 - 1

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.norm(torch.tanh(self.inner(self.table(ids)))))


def trained(
    dtype: torch.dtype, steps: int = 60, lr: float = 1e-4, **fields: Any
) -> tuple[dict[str, Tensor], nn.Module, LNGD]:
    """The way that each weight has gone."""
    model = Words().to(dtype)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, lr=lr, weight_decay=0.0, **fields)
    draw = torch.Generator().manual_seed(1)
    ids, wanted = torch.randint(0, 6, (16, 3), generator=draw), torch.randn(16, 3, 4, generator=draw)
    for _ in range(steps):
        (model(ids).float() * wanted).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() - start[name] for name, p in model.named_parameters()}, model, optimizer


def written(model: nn.Module, numbers: dict[str, Tensor], how: str) -> None:
    if how == "load_state_dict":
        model.load_state_dict(numbers)
    for name, p in model.named_parameters():
        if how == "copy_":
            with torch.no_grad():
                p.copy_(numbers[name])
        elif how == "data.copy_":  # of which the parameter's version does not tell
            p.data.copy_(numbers[name])
        elif how == "data":
            p.data = numbers[name].clone()


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data.copy_", "data"])
@pytest.mark.parametrize("what", ["zeros", "others"])
def test_weights_that_were_written_over_are_those_that_were_written(how: str, what: str) -> None:
    """No rest of the old ones comes back: at a rate of 0 nothing changes."""
    _, model, optimizer = trained(BF16, steps=5)
    assert any(lost.any() for lost in optimizer._rounding.lost.values())
    torch.manual_seed(3)
    make = torch.zeros_like if what == "zeros" else torch.randn_like
    numbers = {name: make(value) for name, value in model.state_dict().items()}
    written(model, numbers, how)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(torch.arange(6).view(2, 3)).float().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if what == "zeros":
            assert not p.any(), name
        else:  # within rounding: half a gap goes to the even number
            torch.testing.assert_close(p.detach(), numbers[name], rtol=2**-7, atol=0.0, msg=name)


def test_the_rest_of_a_number_is_always_taken_for_that() -> None:
    """Of all magnitudes, powers of two and halves of gaps, whose rest is rounded to the next number's border."""
    torch.manual_seed(0)
    bits = torch.randint(0, 1 << 15, (200_000,), dtype=torch.int32) << 16
    tail = torch.randint(0, 1 << 16, (200_000,), dtype=torch.int32)
    tail[::4] = (1 << 15) + torch.randint(-200, 200, (50_000,), dtype=torch.int32)
    bits[1::4] &= 0x7F800000
    value = (bits | tail).view(torch.float32)
    value = value[value.isfinite() & value.to(BF16).isfinite() & (value.abs() > 1e-30)]
    for signed in (value, -value):
        weight = signed.to(BF16)
        lost = (signed - weight).to(BF16)
        assert torch.equal(rest_of(weight, lost), lost)
        assert not rest_of(weight, lost * 2.1)[lost.abs() > weight.abs() * 2**-9].any()


def test_a_state_may_be_loaded_before_its_weights() -> None:
    _, model, optimizer = trained(BF16, steps=5)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    found = []
    for order in ((0, 1), (1, 0)):
        _, again, resumed = trained(BF16, steps=0)
        for which in order:
            (again, resumed)[which].load_state_dict(copy.deepcopy(state[which]))
        for _ in range(3):
            again(torch.arange(6).view(2, 3)).float().square().sum().backward()
            resumed.step()
            resumed.zero_grad()
        found.append(list(again.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("fields", OWNERS, ids=str)
def test_small_updates_add_up_where_the_nearest_number_loses_them(fields: dict[str, Any]) -> None:
    full, _, _ = trained(torch.float32, **fields)
    found = {mode: trained(BF16, bf16_update=mode, **fields)[0] for mode in ("kahan", "stochastic", "nearest")}
    assert found.keys() == {"kahan", "stochastic", "nearest"}

    def along(mode: str, names: list[str]) -> float:
        """How far it went in the direction in which float32 goes, which is 1."""
        ways = [(found[mode][name], full[name]) for name in names]
        return float(sum((x * y).sum() for x, y in ways) / sum(y.square().sum() for _, y in ways))

    assert 0.8 < along("stochastic", list(full)) < 1.2
    for name in full:
        assert not found["nearest"][name].any(), name
        assert 0.7 < along("kahan", [name]) < 1.3, name


def test_kahan_is_the_default_and_loses_next_to_nothing() -> None:
    torch.manual_seed(0)
    full = nn.ParameterList([nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(7))])
    half = copy.deepcopy(full).to(BF16)
    for p, q in zip(full, half, strict=True):
        p.data = q.data.float()
    start = {p: p.detach().clone() for p in full}
    both = [LNGD(full, lr=1e-4, weight_decay=0.01), LNGD(half, lr=1e-4, weight_decay=0.01)]
    for _ in range(50):
        for p, q in zip(full, half, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        for optimizer in both:
            optimizer.step()
    assert both[1].config.bf16_update == "kahan"
    for p, q in zip(full, half, strict=True):
        value = q.float() + both[1]._rounding.lost[q].float()
        assert q.dtype == both[1]._rounding.lost[q].dtype == BF16
        assert (value - p).norm() < 0.02 * (p - start[p]).norm()
        assert ((value - q).abs() <= 2**-8 * q.abs()).all()


def test_the_state_is_float32() -> None:
    for fields in OWNERS:
        _, _, optimizer = trained(BF16, steps=2, matrix_dtype="full", **fields)
        state = optimizer.state_dict()["lngd"]
        kinds = ("groups", "layers", "fallback", "embeddings")
        tensors = [t for kind in kinds for own in state[kind].values() for t in own.values()]
        assert tensors and {t.dtype for t in tensors} == {torch.float32}
        lost = [own["lost"] for own in state["rounding"].values()]
        assert len(lost) == 7 and {t.dtype for t in lost} == {BF16}
        assert optimizer.memory_usage()["rounding"] == 2 * sum(p.numel() for p in Words().parameters())


def test_rounding_at_random_takes_neighbours_and_is_right_in_the_mean() -> None:
    value = torch.tensor([1.0, 1.001, -0.3, 1e-30, -1e-42, 65535.7, 0.0])
    draw = torch.Generator().manual_seed(0)
    rounded = round_at_random(value.repeat(20000, 1), draw)
    assert torch.equal(rounded, rounded.to(BF16).float())
    gap = (value.view(torch.int32) & -65536).add(65536).view(torch.float32) - (value.view(torch.int32) & -65536).view(
        torch.float32
    )
    assert ((rounded - value).abs() <= gap.abs()).all()
    assert ((rounded.double().mean(0) - value).abs() <= 0.02 * gap.abs()).all()
    assert torch.equal(rounded[:, 0], torch.ones(20000)) and not rounded[:, -1].any()
    special = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(round_at_random(special, draw), special)
    assert (
        round_at_random(torch.full((99,), float("nan")).view(torch.int32).add(0x3FFFFF).view(torch.float32), draw)
        .isnan()
        .all()
    )


def test_draws_are_of_the_step_alone_and_leave_the_users_state() -> None:
    (one, after), (two, _), (_, plain) = (
        (trained(BF16, steps=5, bf16_update=mode)[0], torch.rand(()))
        for mode in ("stochastic", "stochastic", "nearest")
        if torch.manual_seed(0)
    )
    assert after == plain
    other, _, _ = trained(BF16, steps=5, bf16_update="stochastic", seed=1)
    assert all(torch.equal(way, two[name]) for name, way in one.items())
    assert any(not torch.equal(way, other[name]) for name, way in one.items())
    rounding, value = Rounding("stochastic", 0), torch.full((50,), 1.003)
    found = []
    for step in (3, 3, 4):
        weight = torch.zeros(50, dtype=BF16)
        rounding.begin(step)
        with rounding.full([weight]) as (whole,):
            whole.copy_(value)
        found.append(weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_other_weights_are_themselves_and_a_fault_leaves_all_whole() -> None:
    rounding = Rounding("kahan", 0)
    weights = [torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.float64, BF16)]
    with pytest.raises(MemoryError), rounding.full(weights) as whole:
        assert whole[0] is weights[0] and whole[1] is weights[1]
        assert whole[2].dtype == torch.float32
        whole[2].zero_()
        raise MemoryError
    assert torch.equal(weights[2], torch.ones(3, dtype=BF16)) and not rounding.lost


@pytest.mark.parametrize(
    ("name", "kept", "told"),
    [
        ("nobody.weight", torch.zeros(2), "rounding: got nobody.weight"),
        ("inner.weight", torch.zeros(2), r"rounding.inner.weight.lost: got \[2\], accepted: a tensor \[8, 8\]"),
    ],
)
def test_a_damaged_state_is_refused(name: str, kept: Tensor, told: str) -> None:
    _, _, optimizer = trained(BF16, steps=1)
    state = copy.deepcopy(optimizer.state_dict())
    state["lngd"]["rounding"][name] = {"lost": kept}
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(state)


def test_weights_of_float16_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0.weight: got a weight of torch.float16.*accepted.*autocast.*bfloat16"):
        LNGD(model)
    model[0].requires_grad_(False)
    LNGD(model)
