"""What counts: micro-batches, recomputed and dropped passes, hooks that come and go; a split of a batch is nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_lngd import LNGD
from tests.helpers import (
    CASES,
    EVERY_STEP,
    IGNORED,
    Case,
    distance,
    equal,
    every_sample,
    factors_of,
    hooks_of,
    layers_of,
    loss_of,
    marian_batch,
    seeded,
    tensors_of,
    tiny_marian,
    train_step,
    weights_of,
)
from tests.reference import factors

MARIAN = CASES["marian"]
EXPECTED: dict[str, Any] = {"preset": "paper", "fisher": "expected"}
EMPIRICAL: dict[str, Any] = {"fisher": "empirical", "direction": "natural"}
ADAPTIVE: dict[str, Any] = {"direction": "natural", "rate": "adaptive"}
SPLIT: list[dict[str, Any]] = [
    {},
    {"bias": "factor", "max_factor_dim": 10},
    ADAPTIVE,
    EMPIRICAL,
    EXPECTED,
    *({"family": family} for family in ("kfac", "tkfac", "ng+")),  # EKFAC's diagonal depends on each eigenvector
    {"embedding": "exact"},
    {"fisher": "true"},
    {"fisher": "sampled"},
]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], most: float = 1e-6) -> None:
    """Each factor to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= most * value.norm(), name


def trained(case: Case, fields: dict[str, Any], parts: int | list[int] = 1, pad: int = 0) -> tuple[Any, LNGD]:
    model, optimizer = case.make(**fields)
    for seed in range(5):
        batch = case.batch(seed)
        if pad:
            batch = {k: F.pad(v, (0, pad), value=IGNORED if k == "labels" else 0) for k, v in batch.items()}
        train_step(model, optimizer, batch, parts)
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "fields"), [*(("marian", fields) for fields in SPLIT), ("images", {}), ("bias", {}), ("kfac", {})], ids=str
)
def test_micro_batches_are_one_batch(name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if fields.get("fisher") in ("true", "sampled"):  # draws differ by how a batch is split: make them certain
        monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
        monkeypatch.setattr(
            torch, "randn", lambda *shape, generator, **k: torch.linspace(0, 2, shape[-1], **k).expand(shape).clone()
        )
    with every_sample():
        (model, optimizer), *others = (trained(CASES[name], fields, parts) for parts in (1, 4, [1, 5, 2]))
    for split, other in others:
        assert distance(weights_of(split), weights_of(model)) < 1e-6
        assert_near(factors_of(other), factors_of(optimizer))


# But to exact embeddings, which count what is looked up: the last word of a sentence is, once padding follows it.
@pytest.mark.parametrize("fields", SPLIT[:-3], ids=str)
def test_padding_is_nothing(fields: dict[str, Any]) -> None:
    fields = {**fields, "embedding": "fallback"}
    model, optimizer = trained(MARIAN, fields)
    padded, other = trained(MARIAN, fields, pad=3)
    assert distance(weights_of(padded), weights_of(model)) < 1e-6
    assert_near(factors_of(other), factors_of(optimizer))


def test_a_scale_of_the_loss_is_nothing_to_factors_of_the_forward_pass() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, optimizer = MARIAN.make(lr=0.0)
        (loss_of(model, MARIAN.batch()) * scale).backward()
        optimizer.step()
        found.append(factors_of(optimizer))
    assert equal(*found)


# Activation checkpointing


def checkpointed(fields: dict[str, Any], **how: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = MARIAN.make(**fields)
    if how:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        if how["use_reentrant"]:
            model.enable_input_require_grads()
    MARIAN.train(model, optimizer, range(4))
    return weights_of(model), factors_of(optimizer)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("fields", [{}, {"direction": "natural"}, {**EXPECTED, "rate": "rms"}], ids=str)
def test_recomputed_forwards_do_not_count(fields: dict[str, Any], reentrant: bool) -> None:
    (weights, plain), (again, found) = checkpointed(fields), checkpointed(fields, use_reentrant=reentrant)
    assert distance(again, weights) < 1e-6
    assert_near(found, plain)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradients_of_checkpointed_layers(reentrant: bool) -> None:
    fields = {**EMPIRICAL, "rate": "adaptive"}
    assert distance(checkpointed(fields, use_reentrant=reentrant)[0], checkpointed(fields)[0]) < 1e-6


# Hooks


def test_hooks_live_for_factor_steps_only() -> None:
    for fields in ({}, {"direction": "natural"}, {"fisher": "sampled"}, {"bias": "factor"}):
        model, optimizer = MARIAN.make(factor_interval=3, embedding="fallback", **fields)
        attached = []
        for seed in range(7):
            attached.append(hooks_of(model) > 0)
            train_step(model, optimizer, MARIAN.batch(seed))
        assert attached == [True, False, False] * 2 + [True]
        MARIAN.train(model, optimizer, range(7, 9))
        assert hooks_of(model) > 0
        optimizer.close()
        assert hooks_of(model) == 0


def test_adaptive_rates_need_every_step_and_exact_embeddings_factor_steps() -> None:
    model, optimizer = MARIAN.make(**ADAPTIVE, factor_interval=9)
    MARIAN.train(model, optimizer, range(1))
    assert hooks_of(model) > 0
    optimizer.close()
    assert hooks_of(model) == 0
    model, optimizer = MARIAN.make(embedding="exact", factor_interval=9)
    MARIAN.train(model, optimizer, range(1))
    assert hooks_of(model) == 0
    MARIAN.train(model, optimizer, range(1, 9))
    assert hooks_of(model) > 0
    optimizer.close()
    assert hooks_of(model) == 0


def test_a_closed_optimizer_may_load_a_state_and_adds_no_hooks(case: Case) -> None:
    model, optimizer = case.make()
    case.train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    optimizer.load_state_dict(state)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("fields", [{}, {"fisher": "sampled"}, EXPECTED], ids=str)
def test_no_activation_is_held(fields: dict[str, Any]) -> None:
    model, optimizer = MARIAN.make(**{**EVERY_STEP, **fields, "rate": "rms"})
    batch = MARIAN.batch()
    for _ in range(2):  # the first forward pass finds out who reads what, the second knows
        seen: list[weakref.ref[Tensor]] = []
        handles = [
            m.register_forward_hook(lambda m, a, o, s=seen: s.extend((weakref.ref(a[0]), weakref.ref(o))))
            for m in model.modules()
            if isinstance(m, nn.Linear)
        ]
        loss = model(**batch).loss
        for handle in handles:
            handle.remove()
        loss.backward()
        del loss
        gc.collect()
        assert seen and all(ref() is None for ref in seen)
        optimizer.step()
        optimizer.zero_grad()


def test_passes_beside_training_do_not_count(case: Case) -> None:
    """Of averages and copies of the model, under no_grad and while `eval()` holds, and by `generate`."""
    found = []
    for beside in (False, True):
        model, optimizer = case.make(lr=0.0)
        case.train(model, optimizer, range(2))
        if beside:
            batch = case.batch(7)
            for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)):
                loss_of(other, batch).backward()
            with torch.no_grad():
                model(**batch)
            optimizer.eval()
            model(**batch)
            optimizer.train()
            if hasattr(model, "generate"):
                model.generate(batch["input_ids"], max_new_tokens=2)
        case.train(model, optimizer, range(2, 3))
        found.append(factors_of(optimizer))
    assert equal(*found)


def test_a_fault_in_the_forward_pass_leaves_the_next_batch_its_own_masks() -> None:
    found = []
    for fault in (True, False):
        model, optimizer = MARIAN.make()
        if fault:
            with pytest.raises(IndexError):
                model(input_ids=MARIAN.batch()["input_ids"] + 10_000, labels=MARIAN.batch()["labels"])
        train_step(model, optimizer, marian_batch(1, source=9))
        found.append(factors_of(optimizer))
    assert equal(*found)


def test_a_mask_that_comes_late_finds_the_right_side() -> None:
    """Source and target equally long: keys of cross attention read the encoder, the decoder's own layers do not."""
    masked = marian_batch(source=6, target=6)
    plain = {name: masked[name] for name in ("input_ids", "labels")}
    plain["labels"] = plain["labels"].clamp_min(2)
    found = []
    for late in (False, True):
        model, optimizer = MARIAN.make(lr=0.0, ema_decay=0.0, **EVERY_STEP)
        for batch in (plain, masked) if late else (masked,):
            train_step(model, optimizer, batch)
        found.append({name: value for name, value in factors_of(optimizer).items() if name.endswith("phi")})
    assert_near(found[1], found[0], 1e-7)


@pytest.mark.parametrize("output", [None, (), {}, 3, object()], ids=["none", "tuple", "dict", "number", "object"])
def test_any_encoders_output_will_do(output: object) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.linear = nn.Module(), nn.Linear(3, 3)
            self.encoder.forward = lambda: output  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            self.encoder()
            return self.linear(x)

    model = Strange()
    optimizer = LNGD(model, lr=1e-3)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert "linear.phi" in factors_of(optimizer)


class NoWaiting(TorchDispatchMode):
    """Fails on whatever would make an accelerator's host wait; reading `host`, which is on the CPU always, does not."""

    waits = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "_to_copy.cpu")

    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in self.waits) and args[0].data_ptr() not in self.host:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"direction": "natural"}, {"embedding": "fallback"}], ids=str)
def test_a_step_does_not_wait_for_the_device(fields: dict[str, Any]) -> None:
    model = tiny_marian().float()
    optimizer = LNGD(model, lr=1e-3, factor_interval=50, inverse_interval=50, update_interval=1, **fields)
    for seed in range(4):
        model(**marian_batch(seed)).loss.backward()
        if seed == 3:
            layers = [model.get_submodule(name) for name in layers_of(optimizer)]
            with NoWaiting({optimizer.state[layer.weight]["step"].data_ptr() for layer in layers}):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()


# Gradients that are dropped: the step is left out, and leaves nothing behind

DROPPED: list[dict[str, Any]] = [{}, EMPIRICAL, ADAPTIVE, {"embedding": "exact"}, {"family": "kfac"}]
IDS = torch.arange(24).view(3, 2, 4) % 7


class Net(nn.Module):
    """A table and two layers; `reentrant` is how its middle is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.reentrant: bool | None = None

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.up(h))

    def forward(self, ids: Tensor) -> Tensor:
        h, kept = self.table(ids), self.reentrant is None
        return self.down(self.middle(h) if kept else checkpoint(self.middle, h, use_reentrant=self.reentrant))


def by_hand(model: nn.Module, optimizer: LNGD) -> None:
    for p in model.parameters():
        p.grad = None


WAYS: dict[str, Callable[[nn.Module, LNGD], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "by hand": by_hand,
}


def backpropagate(model: Callable[[Tensor], Tensor], ids: Tensor, scale: float = 1.0) -> None:
    (model(ids).square().mean() * scale).backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", DROPPED, ids=str)
def test_a_loop_that_leaves_a_step_out(fields: dict[str, Any], way: str) -> None:
    found = []
    for spoil in (False, True):
        model = seeded(Net)
        optimizer = LNGD(model, lr=1e-2, **EVERY_STEP, **fields)
        for step, ids in enumerate(IDS):
            if step == 1:
                for _ in range(2 if spoil else 0):  # two micro-batches, and the same again
                    backpropagate(model, ids)
                    backpropagate(model, ids + 0, float("nan"))
                    WAYS[way](model, optimizer)
                continue
            backpropagate(model, ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=way != "optimizer, zeros")
        found.append({**weights_of(model), **factors_of(optimizer), **tensors_of(optimizer.state_dict())})
    assert equal(*found)


class Hidden(torch.optim.Optimizer):
    """A wrapper that passes on what a loop calls, and none of a scaler's questions."""

    def __init__(self, inner: LNGD) -> None:
        self.inner, self.param_groups, self.state, self.defaults = (
            inner, inner.param_groups, inner.state, inner.defaults,
        )  # fmt: skip

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("fields", DROPPED, ids=str)
def test_a_scaler_that_sees_a_wrapper_alone(fields: dict[str, Any]) -> None:
    found = []
    for spoil in (False, True):
        model = seeded(Net)
        inner = LNGD(model, lr=1e-2, **EVERY_STEP, **fields)
        optimizer, scaler = Hidden(inner), GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
        for step, ids in enumerate(IDS):
            if step == 1 and not spoil:
                continue
            scaler.scale(model(ids).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(factors_of(inner))
    assert equal(*found)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("fields", DROPPED, ids=str)
def test_micro_batches_are_of_one_step_however_gradients_are_zeroed(fields: dict[str, Any], none: bool) -> None:
    found = []
    for parts in (1, 2):
        model = seeded(Net).double()
        optimizer = LNGD(model, lr=1e-2, **EVERY_STEP, **fields)
        for ids in IDS:
            optimizer.zero_grad(set_to_none=none)
            for part in ids.chunk(parts):
                backpropagate(model, part, 1 / parts)
            optimizer.step()
        found.append({**weights_of(model), **factors_of(optimizer)})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9)


def twice_then_back(model: Any, optimizer: LNGD) -> None:
    (model(IDS[0]).square().mean() + model(IDS[1]).square().mean()).backward()


def twice_with_old_gradients_dropped_between(model: Any, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    optimizer.zero_grad()
    (first + model(IDS[1]).square().mean()).backward()


def with_a_look_at_gradients(model: Any, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    torch.autograd.grad(first, model.up.weight, retain_graph=True)
    (first + model(IDS[1]).square().mean()).backward()


def with_a_look_at_outputs(model: Any, optimizer: LNGD) -> None:
    out = model(IDS[0])
    torch.autograd.grad(out.square().mean(), out, retain_graph=True)
    (out.square().mean() + model(IDS[1]).square().mean()).backward()


def dropped_and_taken_again(model: Any, optimizer: LNGD) -> None:
    first = model(IDS[0]).square().mean()
    first.backward(retain_graph=True)
    optimizer.zero_grad(set_to_none=False)
    first.backward()
    backpropagate(model, IDS[1])


def checkpointed_not_reentrant(model: Any, optimizer: LNGD, reentrant: bool = False) -> None:
    model.reentrant = reentrant
    for _ in range(2):  # and of the first two nothing is kept
        optimizer.zero_grad()
        for ids in IDS[:2]:
            backpropagate(model, ids)


def checkpointed_reentrant(model: Any, optimizer: LNGD) -> None:
    checkpointed_not_reentrant(model, optimizer, True)


PASSES = [twice_then_back, twice_with_old_gradients_dropped_between, with_a_look_at_gradients, with_a_look_at_outputs,
          dropped_and_taken_again, checkpointed_not_reentrant, checkpointed_reentrant]  # fmt: skip


@pytest.mark.parametrize("passes", PASSES, ids=lambda passes: passes.__name__)
def test_passes_whose_gradients_stay_or_never_came_count(passes: Callable[[Any, LNGD], None]) -> None:
    """Both batches: Φ is that of one pass over all of it."""
    model, plain = seeded(Net), seeded(Net)
    optimizer, other = LNGD(model, lr=0.0, **EVERY_STEP), LNGD(plain, lr=0.0, **EVERY_STEP)
    passes(model, optimizer)
    optimizer.step()
    backpropagate(plain, IDS[:2].flatten(0, 1))
    other.step()
    for name, value in factors_of(other).items():
        torch.testing.assert_close(factors_of(optimizer)[name], value, msg=name)


# Odd models

ONCE: dict[str, Any] = {"factor_interval": 1, "ema_decay": 0.0, "lr": 0.0}


@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_calls_itself(grad: bool) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            if depth:
                with torch.set_grad_enabled(grad):
                    inner = self(10 * x, depth - 1)
                x = x + inner
            return self.linear(x)

    model, x = seeded(Recursive).double(), torch.randn(6, 4, dtype=torch.float64)
    optimizer = LNGD(model, **ONCE)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            inner, outer = 10 * x, x + model.linear(10 * x)
        a = torch.cat([inner, outer]) if grad else outer  # without gradients it is not trained
        torch.testing.assert_close(optimizer.factors("linear")["phi"], factors(a, torch.ones(len(a), 4))[0])


def two_layers() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).double()


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["looked at", "by hand"])
@pytest.mark.parametrize("fields", [EMPIRICAL, {**EMPIRICAL, "rate": "adaptive"}], ids=str)
def test_gradients_that_are_looked_at_or_set_by_hand(fields: dict[str, Any], how: str) -> None:
    """A gradient penalty's first pass does not count; `torch.autograd.grad` for all parameters does."""
    found = []
    for odd in (False, True):
        model = two_layers()
        optimizer = LNGD(model, lr=1e-2, **fields)
        x = X.clone().requires_grad_(odd)
        output = model(x)
        loss = output.square().mean()
        if odd and how == "looked at":
            torch.autograd.grad(100 * output.sum(), x, retain_graph=True)
        if odd and how == "by hand":
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
        else:
            loss.backward()
        optimizer.step()
        found.append({**factors_of(optimizer), **weights_of(model)})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


@pytest.mark.parametrize("fields", [{}, EMPIRICAL, EXPECTED], ids=str)
def test_a_forward_pass_that_raises_is_not_counted(fields: dict[str, Any]) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.last, self.fails = nn.Linear(4, 4), nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if self.fails:
                self.fails -= 1
                raise MemoryError
            return self.last(torch.tanh(y))

    found = []
    for fails in (0, 1):
        model = seeded(Fails).double()
        optimizer = LNGD(model, lr=0.0, **fields)
        model.fails = fails
        try:
            loss = model(X).square().mean()
        except MemoryError:
            loss = model(X).square().mean()  # the retry, within the handler
        loss.backward()
        optimizer.step()
        found.append(factors_of(optimizer))
    assert equal(*found)


def test_batches_in_lists_are_counted() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3, bias=False)

        def forward(self, batch: list[Tensor] | Tensor) -> Tensor:
            return self.linear(batch[0] if isinstance(batch, list) else batch)

    found = []
    for batch in (X, [X]):
        model = seeded(Lists).double()
        optimizer = LNGD(model, lr=0.0, **EMPIRICAL)
        model(batch).square().sum(1).mean().backward()
        optimizer.step()
        found.append(factors_of(optimizer))
    assert equal(*found)
    optimizer = LNGD(model := Lists(), lr=0.0, fisher="empirical")
    model.linear(torch.randn(2, 4)).sum().backward()  # a part of it: how many rows there are is not known
    with pytest.raises(RuntimeError, match="empirical.*set_batch"):
        optimizer.step()


def test_slopes_in_half_precision_are_squared_in_full() -> None:
    """Of a gate behind a layer, which the paper's presets follow."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * x.new_full((1, 4), 300.0, dtype=torch.float16)

    model, x = Gate(), torch.ones(2, 4)
    optimizer = LNGD(model, lr=0.0, **{**EXPECTED, "rate": "rms"})
    with torch.autocast("cpu", torch.float16):
        output = model(x)
    assert output.dtype == torch.float16
    output.float().sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("linear")["phi"], torch.full((4, 4), 4 * 300.0**2))
