"""Rows: each bad setting, and each part of a state that is gone, damaged or another's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from tests.contract.fault_table import Scene, fault, net
from tests.helpers import assert_identical, tensors_of, through_a_file

SETTINGS, STATES = "Settings", "States (`load_state_dict`)"
REFUSED = "raises before anything is made"
WHOLE = "raises; nothing is changed"
VERSION = 9
FIELDS: dict[str, Any] = {"embedding": "exact"}

BAD: dict[str, list[Any]] = {
    "preset": ["fst", 1],
    "family": ["shampoo", "KFAC"],
    "fisher": ["exact"],
    "direction": ["up", "gram"],
    "whiten": ["phi"],
    "rate": ["fast", None, "trust"],
    "rate_scale": [0, -1, "a", float("nan"), True],
    "damping": ["none", 0, -1],
    "damping_bounds": [(1.0, 0.1), (0.0, 1.0), 0.1, ("a", "b")],
    "momentum": [1, -0.1, "x"],
    "momentum_on": ["both"],
    "ema_decay": [1.0, -1],
    "factor_interval": [0, 2.5, True],
    "inverse_interval": [0],
    "update_interval": [0, 1.5, "often", True],
    "weight_decay": [-1, "x", True],
    "bias": ["none"],
    "max_factor_dim": [0, "big", 2.0],
    "embedding": ["none", "rotated"],
    "exclude": ["("],
    "fallback_lr_scale": [0],
    "betas": [(0.9,), (0.9, 1.0), 0.9, ("a", "b")],
    "eps": [0],
    "seed": [-1, 0.5, 2**64],
}


def make(model: Any = None, **fields: Any) -> LNGD:
    return LNGD(net() if model is None else model, **fields)


def setting_rows() -> None:
    for name, values in BAD.items():
        shown = ", ".join(f"`{value!r}`" for value in values)

        @fault(SETTINGS, f"`{name}` = {shown}", REFUSED, error=f"{name}: got …, accepted: …")
        def bad(scene: Scene, name: str = name, values: list[Any] = values) -> None:
            for value in values:
                with scene.refused():
                    make(**{name: value})
                assert repr(value) in scene.error

    text = LNGDConfig.from_optim_args
    rate = "accepted: a number (or a tensor of one), at least 0"
    more: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        ("an unknown field", "unknown name 'momentun'; did you mean momentum…", lambda: make(momentun=0.9)),
        ("a field that is gone", "unknown name 'matrix_dtype'; …", lambda: make(matrix_dtype="full")),
        ("`--optim_args momentum`", "optim_args: got 'momentum', accepted: name=value", lambda: text("momentum")),
        ("`--optim_args seed=1,seed=2`", "optim_args: got 'seed' twice", lambda: text("seed=1,seed=2")),
        ("`--optim_args seed=1,,eps=1`", "optim_args: got an empty item", lambda: text("seed=1,,eps=1")),
        ("`family=kfac` with `direction=polar`", "direction: got 'polar', accepted: natural (family=kfac)",
         lambda: make(family="kfac", direction="polar")),
        ("`lr` = `-1`", f"lr: got -1, {rate}", lambda: make(lr=-1)),
        ("`lr` = `nan`", f"lr: got nan, {rate}", lambda: make(lr=float("nan"))),
        ("`lr` = a tensor of two", f"lr: got tensor([1., 1.]), {rate}", lambda: make(lr=torch.ones(2))),
        ("an embedding with `sparse=True`", "0.weight: got an embedding with sparse=True, accepted: sparse=False",
         lambda: make(nn.Sequential(nn.Embedding(5, 4, sparse=True)))),
        ("complex parameters", "0.weight: got torch.complex64, accepted: real numbers (or requires_grad=False)",
         lambda: make(nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)))),
        ("lazy layers that were never called", "0.weight: got a parameter without a shape yet, accepted: …",
         lambda: make(nn.Sequential(nn.LazyLinear(3)))),
        ("parameters in place of the model", "model: got generator, accepted: a torch.nn.Module",
         lambda: make(net().parameters())),
        ("a model with nothing to train", "model: got no parameter that requires a gradient",
         lambda: make(net().requires_grad_(False))),
    )  # fmt: skip
    for name, told, call in more:

        @fault(SETTINGS, name, REFUSED, error=told)
        def other(scene: Scene, call: Callable[[], Any] = call) -> None:
            with scene.refused():
                call()


def refused_whole(scene: Scene, spoil: Callable[[dict[str, Any]], Any], **fields: Any) -> None:
    """A state that is spoiled is refused, and what there was before is there, to the bit."""
    scene.make(**{"fisher": "sampled", **FIELDS, **fields})
    state = copy.deepcopy(scene.optimizer.state_dict())
    scene.step()
    before = copy.deepcopy(scene.optimizer.state_dict())
    spoil(state)
    with scene.refused():
        scene.optimizer.load_state_dict(state)
    assert_identical(scene.optimizer.state_dict(), before)


def place_of(state: dict[str, Any], path: str) -> tuple[Any, str]:
    """The dict that a path leads to, and its last key; in `<parameter>/<key>` that of the parameter's own state."""
    *way, last = path.split("/")
    if way[0] == "lngd":
        for key in way:
            state = state[key]
        return state, last
    model = net()  # torch's state dict numbers parameters in the order of the groups
    order = [p for group in LNGD(model, **FIELDS).param_groups for p in group["params"]]
    (number,) = (i for i, p in enumerate(order) if p is model.get_parameter(way[0]))
    return state["state"][number], last


def put(path: str, value: Any, state: dict[str, Any]) -> None:
    """Something else in a place of the state."""
    place, last = place_of(state, path)
    place[last] = value(place[last]) if callable(value) else value


def drop(path: str, state: dict[str, Any]) -> None:
    """A place of the state is gone."""
    place, last = place_of(state, path)
    del place[last]


def not_finite(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


def as_adamws(state: dict[str, Any]) -> None:
    """What torch's AdamW would have of these parameters."""
    del state["lngd"]
    for own in state["state"].values():
        like = next(iter(own.values()))
        own.clear()
        own.update(step=torch.zeros(()), exp_avg=like, exp_avg_sq=like)


TENSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "a factor": ("up.weight/phi", {}),
    "the weight of a factor": ("up.weight/phi_weight", {}),
    "an inverse": ("up.weight/whitener", {}),
    "a momentum": ("up.weight/momentum", {}),
    "a row scale": ("up.weight/row_square", {}),
    "a Ψ of gradients": ("up.weight/psi_blocks", {}),
    "Ψ": ("up.weight/psi", {"direction": "natural"}),
    "AdamW's first moment": ("up.bias/exp_avg", {}),
    "AdamW's second moment": ("up.bias/exp_avg_sq", {}),
    "AdamW's step count": ("up.bias/step", {}),
    "a token's frequency": ("embed.weight/frequency", {}),
}
KEYS = ("config", "parameters", "topology", "steps")


def state_rows() -> None:
    def row(name: str, told: str, spoil: Callable[[dict[str, Any]], Any], **fields: Any) -> None:
        @fault(STATES, name, WHOLE, error=told)
        def happens(scene: Scene) -> None:
            refused_whole(scene, spoil, **fields)

    row("another optimizer's state", "got the state of another optimizer", as_adamws)
    row("`version` is gone", "got the state of another optimizer, accepted: one that LNGD wrote",
        partial(drop, "lngd/version"))  # fmt: skip
    for version in (5, 99):
        row(f"version {version}", f"state_dict: got version {version}, accepted: {VERSION}",
            partial(put, "lngd/version", version))  # fmt: skip
    for key in KEYS:
        row(f"`{key}` is gone", f"state_dict: {key}: got 'none', accepted: a …", partial(drop, f"lngd/{key}"))
        row(f"`{key}` is a text", f"state_dict: {key}: got 'x', accepted: a …", partial(put, f"lngd/{key}", "x"))
    row("`steps` is negative", "steps: got -3, accepted: an integer, at least 0", partial(put, "lngd/steps", -3))
    row("another setting", "the config differs: momentum: checkpoint 0.1, here 0.8",
        partial(put, "lngd/config/momentum", 0.1))  # fmt: skip
    row("another shape of a parameter", "the model differs: up.weight: checkpoint [1], here [8, 6]",
        lambda s: s["lngd"]["parameters"].update({"up.weight": [1]}))  # fmt: skip
    row("a parameter that is not here", "the model differs: x: checkpoint [1], here none",
        lambda s: s["lngd"]["parameters"].update(x=[1]))  # fmt: skip
    for name, (path, fields) in TENSORS.items():
        key = path.replace("up.weight/", "up.").replace("/", ".")
        for how, told, spoil in (
            ("is gone", f"{key}: got none, accepted: a tensor […]", partial(drop, path)),
            ("is a number", f"{key}: got …, accepted: a tensor […]", partial(put, path, 3.0)),
            ("of another shape", f"{key}: got […], accepted: a tensor […]",
             partial(put, path, lambda t: torch.cat((t.flatten(), t.flatten())))),
            ("in integers", f"{key}: got torch.int64, accepted: floating point", partial(put, path, Tensor.long)),
            ("with a NaN in it", f"{key}: got NaN or infinity, accepted: finite numbers",
             partial(put, path, not_finite)),
        ):  # fmt: skip
            row(f"{name} {how}", f"state_dict: {told}", spoil, **fields)
    row("a layer is gone from the topology", "the layers differ: …", lambda s: s["lngd"]["topology"].pop())
    row("a group of the topology without members", "got a damaged state (KeyError: 'members')",
        lambda s: s["lngd"]["topology"][0].pop("members"))  # fmt: skip


setting_rows()
state_rows()


@fault(STATES, "a state of another precision", "converted: what fits is loaded")
def precision(scene: Scene) -> None:
    model, optimizer = scene.make(net().double())
    state = optimizer.state_dict()
    optimizer.close()
    scene.make(model.float(), steps=0)
    scene.optimizer.load_state_dict(state)
    assert int(scene.optimizer.state[model.up.weight]["step"]) == 2


@fault(STATES, "a state that was saved before the first step", "makes a trained optimizer a fresh one")
def fresh(scene: Scene) -> None:
    state = LNGD(net(), lr=1e-2, factor_interval=1, inverse_interval=1).state_dict()
    scene.make()
    scene.optimizer.load_state_dict(state)
    assert not scene.optimizer.state


@fault(STATES, "a full disk while a state is saved", "torch's error; the optimizer is as it was", error="No space left")
def full_disk(scene: Scene) -> None:
    scene.make()
    before = copy.deepcopy(scene.optimizer.state_dict())
    with scene.refused(OSError), open("/dev/full", "wb", buffering=0) as device:
        torch.save(scene.optimizer.state_dict(), device)
    assert_identical(scene.optimizer.state_dict(), before)


@fault(STATES, "a state that goes through a file", "the same bits; `weights_only=True` is enough")
def through_file(scene: Scene) -> None:
    scene.make(fisher="sampled")
    state = scene.optimizer.state_dict()
    assert_identical(tensors_of(through_a_file(state)), tensors_of(state))
