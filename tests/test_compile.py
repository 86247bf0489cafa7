"""torch.compile: the same factors as without, one graph however often LNGD looks, names from before."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import core_batch, core_distance, core_forget_watchers, core_marian, core_step, core_weights
from hf_helpers import hf_images, hf_vit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hf_lngd import LNGD, LNGDTrainer, LNGDTrainingArguments

OFTEN: dict[str, Any] = {"factor_interval": 3, "inverse_interval": 3}  # looks at steps 0, 1, 2, 3, 6, 9, …
EAGER, DEFAULT = "force_eager", "default"


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code, and no watchers that other tests left."""
    core_forget_watchers()
    torch._dynamo.reset()
    counters.clear()
    assert stance() == DEFAULT
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.encoder, self.head = nn.Embedding(9, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids)))


def train(model: nn.Module, call: Callable[[Tensor], Tensor], optimizer: LNGD, steps: int = 11) -> None:
    for step in range(steps):
        ids = torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(step))
        call(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (stance() == EAGER) == bool(optimizer._capture._handles)


def made_before(model: Net, **fields: Any) -> tuple[Callable[[Tensor], Tensor], LNGD]:
    optimizer = LNGD(model, lr=1e-2, **fields)
    return torch.compile(model, backend="aot_eager"), optimizer


def made_of_the_compiled(model: Net, **fields: Any) -> tuple[Callable[[Tensor], Tensor], LNGD]:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return compiled, LNGD(compiled, lr=1e-2, **fields)


def made_after(model: Net, **fields: Any) -> tuple[Callable[[Tensor], Tensor], LNGD]:
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.zeros(8, 4, dtype=torch.int64)).sum().backward()  # it is compiled without hooks
    model.zero_grad()
    return compiled, LNGD(model, lr=1e-2, **fields)


def in_place(model: Net, **fields: Any) -> tuple[Callable[[Tensor], Tensor], LNGD]:
    model.compile(backend="aot_eager", fullgraph=True)
    return model, LNGD(model, lr=1e-2, **fields)


WAYS = [made_before, made_of_the_compiled, made_after, in_place]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_factors_and_weights_are_those_of_eager_runs_and_nothing_is_compiled_twice(way: Any) -> None:
    eager = Net()
    plain = LNGD(eager, lr=1e-2, **OFTEN)
    train(eager, eager, plain)
    plain.close()
    model = Net()
    call, optimizer = way(model, **OFTEN)
    train(model, call, optimizer)
    assert counters["stats"]["unique_graphs"] == 1 and counters["frames"]["total"] <= 1
    assert not counters["graph_break"]
    assert list(optimizer._capture.layers) == list(plain._capture.layers)
    for name in plain._capture.layers:
        for kind, value in plain.factors(name).items():
            torch.testing.assert_close(optimizer.factors(name)[kind], value, rtol=1e-4, atol=1e-6)
    for one, two in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    optimizer.close()
    assert stance() == DEFAULT


def test_a_translation_model_with_its_masks_and_chains() -> None:
    found = []
    for compiled in (False, True):
        model = core_marian(encoder_layers=1, decoder_layers=1)
        optimizer = LNGD(model, lr=1e-2, chain="full", matrix_dtype="full", **OFTEN)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in range(8):
            core_step(call, optimizer, core_batch(seed))
        found.append((core_weights(model), {n: optimizer.factors(n)["phi"] for n in optimizer._capture.layers}))
        optimizer.close()
    assert counters["stats"]["unique_graphs"] == 1
    assert core_distance(found[1][0], found[0][0]) < 1e-6
    assert core_distance(found[1][1], found[0][1]) < 1e-6


@pytest.mark.parametrize("fields", [{"rate": "adaptive", "direction": "natural"}, {"embedding": "exact"}], ids=str)
def test_what_watches_every_step_runs_eagerly_and_so_is_exact(fields: dict[str, Any]) -> None:
    found = []
    for compiled in (False, True):
        model = Net()
        call, optimizer = made_before(model, **fields) if compiled else (model, LNGD(model, lr=1e-2, **fields))
        for step in range(5):
            ids = torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(step))
            call(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(list(model.parameters()))
        assert not counters["stats"]["unique_graphs"] and stance() == EAGER
        optimizer.close()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert stance() == DEFAULT


def test_evaluation_and_what_comes_after_run_compiled() -> None:
    model = Net()
    optimizer, other = LNGD(model, lr=1e-2), LNGD(Net(), lr=1e-2)
    assert stance() == EAGER
    optimizer.eval()
    assert stance() == EAGER  # the other's
    other.close()
    assert stance() == DEFAULT
    optimizer.train()
    assert stance() == EAGER
    del optimizer, model
    gc.collect()
    assert stance() == DEFAULT
    with torch.compiler.set_stance("eager_on_recompile"):
        third = LNGD(Net(), lr=1e-2)
        assert stance() == EAGER
        third.close()
        assert stance() == "eager_on_recompile"


def stepping(model: nn.Module, call: Callable[[Tensor], Tensor], optimizer: LNGD, step: int) -> None:
    ids = torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(step))
    call(ids).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("close", ["within", "after"])
@pytest.mark.parametrize("each", [False, True], ids=["around all steps", "around each step"])
def test_a_stance_of_the_users_around_steps_leaves_nothing_behind(each: bool, close: str) -> None:
    """LNGD puts its stance there before, so the end of the `with` puts it back after LNGD wanted it."""
    model = Net()
    optimizer = LNGD(model, lr=1e-2)
    for _ in range(6 if each else 1):
        with torch.compiler.set_stance("eager_on_recompile"):
            for _ in range(1 if each else 6):
                stepping(model, model, optimizer, optimizer._steps)
                assert stance() == (EAGER if optimizer._capture._handles else "eager_on_recompile")
            if close == "within" and optimizer._steps == 6:
                optimizer.close()
                assert stance() == "eager_on_recompile"
        if optimizer._steps < 6:
            assert stance() == (EAGER if optimizer._capture._handles else DEFAULT)
    assert stance() == DEFAULT  # the next factor step is the 20th
    optimizer.close()
    assert stance() == DEFAULT
    model.compile(backend="aot_eager")
    model(torch.zeros(2, 4, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("at", [0, 4], ids=["while LNGD looks", "while it does not"])
def test_a_stance_that_the_user_sets_in_mid_training_stays(at: int) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-2, **OFTEN)
    try:
        for step in range(11):
            if step == at:
                torch.compiler.set_stance("default", skip_guard_eval_unsafe=True, force_backend="eager")
            stepping(model, model, optimizer, step)
            assert (stance() == EAGER) == bool(optimizer._capture._handles)
        optimizer.close()
        found = torch._dynamo.eval_frame._stance
        assert (found.stance, found.skip_guard_eval_unsafe, found.backend) == (DEFAULT, True, "eager")
    finally:
        torch.compiler.set_stance(DEFAULT)


def test_a_stance_that_keeps_compiled_code_from_being_seen_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 4)
    call = torch.compile(model, backend="aot_eager")
    call(x).sum().backward()
    optimizer = LNGD(model)
    with torch.compiler.set_stance("eager_on_recompile"):
        call(x).sum().backward()
        with pytest.raises(RuntimeError, match="no forward pass.*no torch.compiler.set_stance.*'eager_on_recompile'"):
            optimizer.step()
        call(x).sum().backward()  # from now on it is seen
        optimizer.step()
    optimizer.close()
    assert stance() == DEFAULT


def test_names_and_states_are_those_from_before() -> None:
    def make(how: str) -> tuple[nn.Module, LNGD]:
        model: nn.Module = Net()
        if how == "parts":
            model.encoder = torch.compile(model.encoder, backend="aot_eager")
            model.head = torch.compile(model.head, backend="aot_eager")
        if how == "whole":
            model = torch.compile(model, backend="aot_eager")
        return model, LNGD(model, lr=1e-2, **OFTEN)

    ids = torch.arange(8).view(2, 4)
    states = {}
    for how in ("plain", "parts", "whole"):
        model, optimizer = make(how)
        for _ in range(2):
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states[how] = copy.deepcopy(optimizer.state_dict())
        assert "_orig_mod" not in str(states[how].keys() | states[how]["lngd"]["layers"].keys())
        assert not any("_orig_mod" in r.parameter + r.layer for r in optimizer.routing())
        optimizer.close()
    for here in ("plain", "parts", "whole"):
        for there, state in states.items():
            _, optimizer = make(here)
            optimizer.load_state_dict(state)
            phi = states["plain"]["lngd"]["groups"]["encoder.0.up"]["phi"]
            loaded = optimizer.state_dict()["lngd"]["groups"]["encoder.0.up"]["phi"]
            torch.testing.assert_close(loaded, phi, msg=f"{there} → {here}")
            optimizer.close()


def test_a_whole_training_step_that_is_compiled() -> None:
    found = []
    for compiled in (False, True):
        model = Net()
        optimizer = LNGD(model, lr=1e-2, **OFTEN)

        def step(ids: Tensor, model: Net = model, optimizer: LNGD = optimizer) -> None:
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        call = torch.compile(step, backend="aot_eager") if compiled else step
        for seed in range(8):
            call(torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(seed)))
        optimizer.close()
        found.append(list(model.parameters()))
    assert counters["stats"]["unique_graphs"] == 1
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_trainers_flag(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        flags = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        args = LNGDTrainingArguments(
            str(tmp_path), optim_args="factor_interval=3", use_cpu=True, report_to="none", save_strategy="no",
            max_steps=6, per_device_train_batch_size=4, disable_tqdm=True, learning_rate=0.01, **flags,
        )  # fmt: skip
        trainer = LNGDTrainer(hf_vit(), args, train_dataset=hf_images(24))
        trainer.train()
        assert stance() == DEFAULT
        found.append(trainer.model.state_dict())
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)
