"""Rows: each bad setting, and each part of a state that is gone, damaged or another's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.serialization import VERSION
from tests.fault_table import Net, Scene, fault
from tests.test_config import BAD

SETTINGS, STATES = "Settings", "States (`load_state_dict`)"
REFUSED = "refused before anything is made"
WHOLE = "refused whole: nothing is changed"


def setting_rows() -> None:
    for name, values in BAD.items():
        shown = ", ".join(f"`{value!r}`" for value in values)

        @fault(SETTINGS, f"`{name}` = {shown}", REFUSED, error=f"{name}: got …, accepted: …")
        def bad(scene: Scene, name: str = name, values: list[Any] = values) -> None:
            for value in values:
                with scene.refused():
                    LNGD(Net(), **{name: value})
                assert repr(value) in scene.error

    more: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        ("an unknown field", "unknown name 'momentun'; did you mean momentum…", lambda: LNGD(Net(), momentun=0.9)),
        ("`--optim_args momentum`", "optim_args: got 'momentum', accepted: name=value", lambda: text("momentum")),
        ("`--optim_args seed=1,seed=2`", "optim_args: got 'seed' twice", lambda: text("seed=1,seed=2")),
        ("`--optim_args seed=1,,eps=1`", "optim_args: got an empty item", lambda: text("seed=1,,eps=1")),
        ("`damping_min` above `damping_max`", "damping_min: got 1.0, accepted: at most damping_max = 0.1",
         lambda: LNGD(Net(), damping_min=1.0, damping_max=0.1)),
        ("`family=kfac` with `direction=polar`", "direction: got 'polar', accepted: natural (family=kfac)",
         lambda: LNGD(Net(), family="kfac", direction="polar")),
        ("`lr` = `-1`", "lr: got -1, accepted: a number (or a tensor of one), at least 0", lambda: LNGD(Net(), lr=-1)),
        ("`lr` = `nan`", "lr: got nan, accepted: a number (or a tensor of one), at least 0",
         lambda: LNGD(Net(), lr=float("nan"))),
        ("`lr` = a tensor of two", "lr: got tensor([1., 1.]), accepted: a number (or a tensor of one), at least 0",
         lambda: LNGD(Net(), lr=torch.ones(2))),
        ("an embedding with `sparse=True`", "0.weight: got an embedding with sparse=True, accepted: sparse=False",
         lambda: LNGD(torch.nn.Sequential(torch.nn.Embedding(5, 4, sparse=True)))),
        ("complex parameters", "0.weight: got torch.complex64, accepted: real numbers (or requires_grad=False)",
         lambda: LNGD(torch.nn.Sequential(torch.nn.Linear(4, 3, dtype=torch.complex64)))),
        ("lazy layers that were never called", "0.weight: got a parameter without a shape yet, accepted: …",
         lambda: LNGD(torch.nn.Sequential(torch.nn.LazyLinear(3)))),
        ("parameters in place of the model", "model: got generator, accepted: a torch.nn.Module",
         lambda: LNGD(Net().parameters())),  # type: ignore[arg-type]
        ("a model with nothing to train", "model: got no parameter that requires a gradient",
         lambda: LNGD(Net().requires_grad_(False))),
    )  # fmt: skip
    for name, told, make in more:

        @fault(SETTINGS, name, REFUSED, error=told)
        def other(scene: Scene, make: Callable[[], Any] = make) -> None:
            with scene.refused():
                make()


def text(optim_args: str) -> LNGDConfig:
    return LNGDConfig.from_optim_args(optim_args)


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a state by its path."""
    found: dict[str, Tensor] = {}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        name = f"{prefix}.{key}"
        found |= {name: value} if isinstance(value, Tensor) else flat(value, name)
    return found


def refused_whole(scene: Scene, spoil: Callable[[dict[str, Any]], Any]) -> None:
    """A state that is spoiled is refused, and what there was before is there, to the bit."""
    scene.make(fisher="sampled")
    state = copy.deepcopy(scene.optimizer.state_dict())
    scene.step()
    before = {name: value.clone() for name, value in flat(scene.optimizer.state_dict()).items()}
    rates = [group["lr"] for group in scene.optimizer.param_groups]
    spoil(state)
    with scene.refused():
        scene.optimizer.load_state_dict(state)
    after = flat(scene.optimizer.state_dict())
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert [group["lr"] for group in scene.optimizer.param_groups] == rates


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Something else in a place of the state; names of modules have no dots here."""

    def spoil(state: dict[str, Any]) -> None:
        *way, last = path.split("/")
        for key in way:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return spoil


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    """A place of the state is gone."""

    def spoil(state: dict[str, Any]) -> None:
        *way, last = path.split("/")
        for key in way:
            state = state[key]
        del state[last]

    return spoil


def first(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda tensor: change(tensor.clone())


def not_finite(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = torch.nan
    return tensor


TENSORS = {
    "a factor": "lngd/groups/up/phi",
    "the weight of a factor": "lngd/groups/up/weight",
    "an inverse": "lngd/groups/up/whitener",
    "a momentum": "lngd/layers/up/momentum",
    "a row scale": "lngd/layers/up/row_square",
    "Ψ": "lngd/layers/up/psi",
    "AdamW's first moment": "lngd/fallback/up.bias/exp_avg",
    "AdamW's second moment": "lngd/fallback/up.bias/exp_avg_sq",
    "AdamW's step count": "lngd/fallback/up.bias/step",
    "an embedding's mean": "lngd/embeddings/embed.weight/mean",
    "an embedding's basis": "lngd/embeddings/embed.weight/basis",
}
KEYS = (
    "config", "parameters", "steps", "topology", "groups", "layers", "flags", "fallback", "embeddings", "random",
    "rounding",
)  # fmt: skip


def state_rows() -> None:
    def row(name: str, told: str, spoil: Callable[[dict[str, Any]], Any]) -> None:
        @fault(STATES, name, WHOLE, error=told)
        def happens(scene: Scene) -> None:
            refused_whole(scene, spoil)

    row("another optimizer's state", "got the state of another optimizer", lambda s: s.pop("lngd"))
    row("`version` is gone", "got the state of another optimizer, accepted: one that LNGD wrote", drop("lngd/version"))
    row("another version", f"state_dict: got version 99, accepted: {VERSION}", put("lngd/version", 99))
    for key in KEYS:
        row(f"`{key}` is gone", f"got a state without {key}, accepted: a whole one", drop(f"lngd/{key}"))
        row(f"`{key}` is a text", f"state_dict: {key}: got 'x', accepted: a …", put(f"lngd/{key}", "x"))
    row("`steps` is negative", "steps: got -3, accepted: an integer, at least 0", put("lngd/steps", -3))
    row("another setting", "the config differs: momentum: checkpoint 0.1, here 0.8", put("lngd/config/momentum", 0.1))
    row("another shape of a parameter", "the model differs: up.weight: checkpoint [1], here [8, 6]",
        put("lngd/parameters/up.weight", [1]))  # fmt: skip
    row("a parameter that is not here", "the model differs: x: checkpoint [1], here none",
        put("lngd/parameters", lambda p: p | {"x": [1]}))  # fmt: skip
    for name, path in TENSORS.items():
        key = path.removeprefix("lngd/").replace("/", ".")
        row(f"{name} is gone", f"state_dict: {key}: got none, accepted: a tensor […]", drop(path))
        row(f"{name} is a number", f"state_dict: {key}: got none, accepted: a tensor […]", put(path, 3.0))
        row(f"{name} of another shape", f"state_dict: {key}: got […], accepted: a tensor […]",
            put(path, first(lambda t: torch.cat((t.flatten(), t.flatten())))))  # fmt: skip
        row(
            f"{name} in integers",
            f"state_dict: {key}: got torch.int64, accepted: floating point",
            put(path, first(Tensor.long)),
        )
        row(f"{name} with a NaN in it", f"state_dict: {key}: got NaN or infinity, accepted: finite numbers",
            put(path, first(not_finite)))  # fmt: skip
    row("a parameter that AdamW does not have", "fallback: got strange, accepted: names of parameters here",
        lambda s: s["lngd"]["fallback"].update(strange={}))  # fmt: skip
    row("an embedding is gone", "embeddings: got none of embed.weight", drop("lngd/embeddings/embed.weight"))
    row("a layer is gone from the topology", "the layers differ: …", lambda s: s["lngd"]["topology"].pop())
    row("a group of the topology without members", "got a damaged state (KeyError: 'members')",
        lambda s: s["lngd"]["topology"][0].pop("members"))  # fmt: skip
    row("a flag is gone", "flags.started: got none, accepted: … values", drop("lngd/flags/started"))
    row(
        "flags of fewer banks",
        "flags.inverted: got …, accepted: … values",
        lambda s: s["lngd"]["flags"]["inverted"].pop(),
    )
    row(
        "a random state that is none",
        "got a damaged state (…",
        lambda s: s["lngd"]["random"].update(cpu=torch.zeros(3)),
    )


setting_rows()
state_rows()


@fault(STATES, "a state of another precision", "converted: what fits is loaded")
def precision(scene: Scene) -> None:
    model, optimizer = scene.make(Net().double())
    state = optimizer.state_dict()
    optimizer.close()
    scene.make(model.float(), steps=0, matrix_dtype="full")
    optimizer = LNGD(Net().double(), lr=1e-2, **scene.fields)
    state["lngd"]["config"]["matrix_dtype"] = "full"
    scene.optimizer.load_state_dict(state)
    assert scene.optimizer._steps == 2


@fault(STATES, "a state that was saved before the first step", "makes a trained optimizer a fresh one")
def fresh(scene: Scene) -> None:
    state = LNGD(Net(), lr=1e-2, factor_interval=1, inverse_interval=1, early_factors=False).state_dict()
    scene.make()
    scene.optimizer.load_state_dict(state)
    assert scene.optimizer._preconditioner is None


@fault(STATES, "a full disk while a state is saved", "torch's error; the optimizer is as it was", error="No space left")
def full_disk(scene: Scene) -> None:
    scene.make()
    before = {name: value.clone() for name, value in flat(scene.optimizer.state_dict()).items()}
    with scene.refused(OSError), open("/dev/full", "wb", buffering=0) as device:
        torch.save(scene.optimizer.state_dict(), device)
    after = flat(scene.optimizer.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@fault(STATES, "a state in which everything was cut to one bank's rows", WHOLE, error="accepted: a tensor […]")
def cut(scene: Scene) -> None:
    def spoil(state: dict[str, Any]) -> None:
        for tensors in state["lngd"]["groups"].values():
            for key, value in tensors.items():
                tensors[key] = value[:0].clone()

    refused_whole(scene, spoil)


@fault(STATES, "a state that goes through a file", "the same bits; `weights_only=True` is enough")
def through_a_file(scene: Scene) -> None:
    scene.make(fisher="sampled")
    buffer = io.BytesIO()
    torch.save(scene.optimizer.state_dict(), buffer)
    buffer.seek(0)
    before, loaded = flat(scene.optimizer.state_dict()), flat(torch.load(buffer, weights_only=True))
    assert before.keys() == loaded.keys() and all(torch.equal(loaded[name], value) for name, value in before.items())
