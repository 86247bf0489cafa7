"""Parameter groups are obeyed: rate, decay, momentum and betas are read in every step; schedulers keep ratios."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from hf_lngd import LNGD
from tests.helpers import CASES, EVERY_STEP, Case, equal, seeded, weights_of

KINDS = ("lngd", "lngd_bias", "embedding", "fallback", "fallback_no_decay")
ONE_STEP = range(1)


def named(optimizer: LNGD, name: str) -> dict[str, Any]:
    """The group of this name."""
    (group,) = (group for group in optimizer.param_groups if group["name"] == name)
    return group


def test_groups_may_be_split_merged_and_ordered_as_one_likes(case: Case) -> None:
    """What is done with a parameter is decided by the routing: the same training, to the bit."""
    plain, other = case.make(), case.make()
    optimizer = other[1]
    (*first, last) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = first
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [last], "name": "last layer"})
    optimizer.param_groups.reverse()
    for run in (plain, other):
        case.train(*run)
    assert equal(plain[0], other[0])
    assert last in optimizer.state and "exp_avg" not in optimizer.state[last]


def test_rates_of_layers_of_their_own(case: Case) -> None:
    """A step of each parameter is proportional to its group's lr · lr_scale, where that is no low rate; at 0 it
    rests."""
    moved = {}
    for share in (1.0, 0.0, 0.25):
        model, optimizer = case.make(weight_decay=0.0, lr=0.1, momentum_on="gradient", rate="rms", update_interval=1)
        before = weights_of(model)
        for i, group in enumerate(optimizer.param_groups):
            group["lr" if i else "lr_scale"] *= share
        case.train(model, optimizer, ONE_STEP)
        moved[share] = {name: value.double() - before[name].double() for name, value in weights_of(model).items()}
    rounding = 0.03 if case.dtype == torch.bfloat16 else 1e-9
    for name, whole in moved[1.0].items():
        assert whole.any() and not moved[0.0][name].any(), name
        if case.dtype != torch.bfloat16:
            torch.testing.assert_close(moved[0.25][name], 0.25 * whole, rtol=1e-6, atol=rounding)


def test_layer_wise_rates_by_param_groups(case: Case) -> None:
    model = case.model()
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    first, second = names[0], names[-1]
    settings = {**EVERY_STEP, **case.fields, "lr": 1e-2}
    optimizer = LNGD(
        model,
        param_groups=[
            {"params": f"^{first}$".replace(".", r"\."), "lr": 1e-3, "name": "slow"},
            {"params": [model.get_parameter(second)], "lr": 0.0},
        ],
        **settings,
    )
    slow = [group for group in optimizer.param_groups if group["name"].startswith("slow.")]
    assert len(slow) == 1 and slow[0]["lr"] == 1e-3 and slow[0]["params"] == [model.get_parameter(first)]
    (still,) = (g for g in optimizer.param_groups if any(p is model.get_parameter(second) for p in g["params"]))
    assert still["lr"] == 0.0 and still["name"].split(".")[1] in KINDS
    assert {group["lr"] for group in optimizer.param_groups if group["name"] in KINDS} == {1e-2}
    before = weights_of(model)
    case.train(model, optimizer)
    after = weights_of(model)
    assert torch.equal(after[second], before[second]) and not torch.equal(after[first], before[first])


def test_param_groups_in_one_group_each_are_the_plain_optimizer(case: Case) -> None:
    """With the same values: by regex, by names and by parameters."""
    plain = case.make()
    case.train(*plain)
    for pick in (lambda m: ".", lambda m: [n for n, _ in m.named_parameters()], lambda m: list(m.parameters())):
        model = case.model()
        every_other = {"factor_interval": 2, "inverse_interval": 2, **case.fields}
        optimizer = LNGD(
            model, lr=0.5, param_groups=[{"params": pick(model), "lr": 1e-2, "name": "all"}], **every_other
        )
        names = {group["name"] for group in optimizer.param_groups}
        assert names == {f"all.{group['name']}" for group in plain[1].param_groups}
        case.train(model, optimizer)
        assert equal(model, plain[0])


def test_a_parameter_in_two_groups_is_refused_and_one_in_none_rests(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["images"]
    model, optimizer = case.make()
    with pytest.raises(ValueError, match="more than one parameter group|some parameters"):
        optimizer.add_param_group({"params": [model.head.weight]})
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not model.head.weight and p is not model.norm.bias]
    before = weights_of(model)
    with caplog.at_level(logging.WARNING, "hf_lngd"):
        case.train(model, optimizer)
    (message,) = caplog.messages
    assert "not trained: 'norm.bias', 'head.weight'. They" in message
    after = weights_of(model)
    assert [n for n, value in after.items() if torch.equal(value, before[n])] == ["norm.bias", "head.weight"]


def test_a_warning_names_what_is_trained_by_nobody_where_all_that_was_is_frozen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    optimizer = LNGD(model)
    for step in range(8):
        if step == 3:
            model[0].requires_grad_(True)
            model[2].requires_grad_(False)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not caplog.messages or step >= 3
    (message,) = caplog.messages
    assert "not trained: '0.weight', '0.bias'. They" in message


@pytest.mark.parametrize("key", ["betas", "momentum"])
def test_momentum_of_a_group_is_read_in_every_step(case: Case, key: str) -> None:
    plain, other = case.make(momentum=0.5), case.make(momentum=0.9)
    for i, run in enumerate((plain, other)):
        for group in run[1].param_groups:
            if i and group["name"] in ("lngd", "lngd_bias", "embedding") and group["betas"][0] == 0.9:
                group[key] = (0.5, group["betas"][1]) if key == "betas" else 0.5
        case.train(*run)
    assert equal(*(run[0] for run in (plain, other)))
    named(other[1], "lngd")[key] = (0.1, 0.95) if key == "betas" else 0.1  # from now on
    for run in (plain, other):
        case.train(*run, range(3, 6))
    assert not equal(plain[0], other[0])


def test_weight_decay_of_a_group_is_read_in_every_step(case: Case) -> None:
    """Decoupled: the weights shrink by lr · lr_scale · weight_decay of the group, whatever the step is."""
    found = []
    for decay in (0.0, 1.0):
        model, optimizer = case.make(weight_decay=0.0, update_interval=1)
        case.train(model, optimizer, range(2))
        before = weights_of(model)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        case.train(model, optimizer, range(2, 3))
        found.append(weights_of(model))
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, value in before.items():
        shrunk = found[0][name].double() - found[1][name].double()
        expected = 1e-2 * scales[model.get_parameter(name)] * value.double()
        atol = 0.02 if case.dtype == torch.bfloat16 else 1e-9
        torch.testing.assert_close(shrunk, expected, rtol=1e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_all_other_parameters_take_torchs_adamw() -> None:
    """To the bit, with betas, eps and rates that change in mid-training."""
    case = Case("words", CASES["paper"].build, CASES["paper"].batch_of, dtype=torch.float32)
    (model, optimizer), other = case.make(exclude=".", weight_decay=0.1, lr=1e-3), case.model()
    twin = dict(zip(model.parameters(), other.parameters(), strict=True))
    groups = [
        {"params": [twin[p] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    rate = 1e-3 * optimizer.config.fallback_lr_scale
    adamw = torch.optim.AdamW(groups, lr=rate, betas=optimizer.config.betas, fused=True)
    for step in range(6):
        if step == 3:
            for group in (*optimizer.param_groups, *adamw.param_groups):
                group |= {"betas": (0.7, 0.9), "eps": 1e-5, "lr": group["lr"] * 0.5, "weight_decay": 0.3}
        case.train(model, optimizer, range(step, step + 1))
        case.train(other, adamw, range(step, step + 1))
    assert equal(model, other)


class Mixed(nn.Module):
    """Parameters whose memory is not in the order of their dimensions: all but the first go to AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.turned, self.cut = nn.Parameter(torch.randn(4, 5).T), nn.Parameter(torch.randn(5, 8)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).mean((2, 3)) @ (self.turned * self.cut).T).square().mean()


@pytest.mark.parametrize("change", ["memory_format", "gradient", "dtype"])
def test_adamw_goes_on_as_torchs_where_memory_is_laid_out_anew(change: str) -> None:
    """In mid-training, by `module.to`, or by whoever writes gradients."""
    models = [seeded(Mixed), seeded(Mixed)]
    optimizers: list[Any] = [
        LNGD(models[0], lr=1e-2, exclude=".", fallback_lr_scale=1.0, weight_decay=0.0),
        torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.0),
    ]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 3 and change == "memory_format":
                model.to(memory_format=torch.channels_last)
            elif step == 3 and change == "dtype":
                model.double()
                for state in optimizer.state.values():  # torch's own does not follow
                    state.update({k: v.double() for k, v in state.items() if k != "step"})
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(model.conv.weight)
            model(x).backward()
            if change == "gradient":
                gradient = model.conv.weight.grad
                model.conv.weight.grad = gradient.contiguous(memory_format=torch.channels_last)
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_parameters_of_no_layer_may_be_added_late() -> None:
    model, optimizer = CASES["images"].make()
    CASES["images"].train(model, optimizer, ONE_STEP)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "lr_scale": 1.0, "weight_decay": 0.0})
    extra.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(extra.detach(), torch.full((3,), 0.5))  # AdamW's first step
    assert optimizer.param_groups[-1].keys() >= {"params", "name", "lr", "lr_scale", "weight_decay", "betas", "eps"}
    for bad, error in (
        ([extra], TypeError),
        ({"params": [extra]}, ValueError),
        ({"params": [torch.ones(1)[0] * extra]}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"direction": "natural"}, float), ({"momentum_on": "update"}, torch.tensor)],
    ids=["float", "tensor"],
)
def test_biases_in_factors_have_a_rate_of_their_own(fields: dict[str, Any], kind: Any) -> None:
    case = CASES["bias"]
    moved = {}
    for share in (1.0, 0.0, 0.25):
        model, optimizer = case.make(weight_decay=0.0, lr=kind(1e-2), **fields)
        group = named(optimizer, "lngd_bias")
        group["lr"] = kind(share * 1e-2)
        before = weights_of(model)
        case.train(model, optimizer, ONE_STEP)
        moved[share] = {name: value - before[name] for name, value in weights_of(model).items()}
    for name, whole in moved[1.0].items():
        assert whole.any()
        share = 0.25 if any(model.get_parameter(name) is bias for bias in group["params"]) else 1.0
        assert bool(moved[0.0][name].any()) == (share == 1)
        torch.testing.assert_close(moved[0.25][name], share * whole, rtol=1e-3, atol=1e-7)
    for group in optimizer.param_groups:  # before a warm-up
        group["lr"] = kind(0.0)
    case.train(model, optimizer, ONE_STEP)
    assert all(p.isfinite().all() for p in model.parameters())


# Rates and schedulers


def test_a_rate_in_a_tensor_is_a_rate() -> None:
    case = CASES["images"]
    plain, (model, optimizer) = case.make(), case.make(lr=torch.tensor(1e-2))
    for run in (plain, (model, optimizer)):
        case.train(*run)
    for one, two in zip(plain[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    optimizer.param_groups[0]["lr"].fill_(0.0)  # changed in place, as a compiled loop does
    before = model.head.weight.clone()
    case.train(model, optimizer, range(3, 4))
    assert torch.equal(before, model.head.weight)
    _, resumed = case.make(lr=torch.tensor(0.3))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(resumed.param_groups[0]["lr"], Tensor) and float(resumed.param_groups[0]["lr"]) == 0.0


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "SWALR": lambda o: SWALR(o, 1e-3, anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_with_their_defaults_keep_the_ratio_of_the_groups(name: str) -> None:
    case = CASES["bias"]
    model, optimizer = case.make(lr=torch.tensor(1e-2) if name in ("OneCycleLR", "SWALR", "LambdaLR") else 1e-2)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    scheduler, rates, momenta = SCHEDULERS[name](optimizer), [], []
    for step in range(5):
        rates.append({round(float(group["lr"]), 9) for group in optimizer.param_groups})
        momenta.append(named(optimizer, "lngd")["betas"][0])
        case.train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert [len(row) for row in rates] == [1] * 5 and len(set(map(frozenset, rates))) > 1
    assert [group["lr_scale"] for group in optimizer.param_groups] == scales
    assert (len(set(momenta)) > 1) == (name in ("OneCycleLR", "CyclicLR"))  # these cycle the momentum, too
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loaded", [False, True])
def test_plateau(loaded: bool) -> None:
    _, optimizer = CASES["images"].make(lr=(given := torch.tensor(1e-2)))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    if loaded:  # groups that share one tensor
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = given
        optimizer.load_state_dict(state)
    before = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([rate / 10 for rate in before])
    assert float(given) == pytest.approx(1e-2)  # the caller's own is left as it is


def test_the_row_decay_of_a_group_is_its_second_beta() -> None:
    found = []
    for second in (0.95, 0.5):
        model, optimizer = CASES["images"].make()
        group = named(optimizer, "lngd")
        group["betas"] = (group["betas"][0], second)
        CASES["images"].train(model, optimizer)
        found.append(weights_of(model))
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])
