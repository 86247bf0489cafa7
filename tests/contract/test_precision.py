"""Precision: a gradient scaler, autocast, weights in bfloat16, models that are moved; factors stay those of float32."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lngd import LNGD
from tests.helpers import (
    EVERY_STEP,
    IGNORED,
    cpu_with,
    distance,
    equal,
    every_sample,
    factors_of,
    loss_of,
    marian_batch,
    seeded,
    tensors_of,
    through_a_file,
    tiny_marian,
    train_step,
    weights_of,
)
from tests.hf_helpers import hf_vit

BF16 = torch.bfloat16
# What collects statistics of gradients, and what counts in forward passes.
SCALED: list[dict[str, Any]] = [
    {},
    {"fisher": "empirical", "direction": "natural"},
    {"direction": "natural", "rate": "adaptive"},
    {"preset": "lngd_lr"},
    {"family": "ekfac"},
    {"family": "ng+", "rate": "adaptive"},
]


def scaler_of(scale: float, **fields: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=10**6, **fields)


class Loop:
    """A plain loop as torch's notes on mixed precision write it, in float32 so that powers of two are exact."""

    def __init__(self, fields: dict[str, Any], scale: float | None, clip: float | None = None) -> None:
        self.model, self.clip = tiny_marian(init_std=0.25).float(), clip
        self.optimizer = LNGD(self.model, lr=1e-2, **{**EVERY_STEP, **fields})
        self.scaler = scaler_of(scale or 1.0, enabled=scale is not None)

    def step(self, seed: int, parts: int = 1, spoil: bool = False) -> None:
        batch = marian_batch(seed)
        terms = (batch["labels"] != IGNORED).sum()
        for part in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
            loss = loss_of(self.model, dict(zip(batch, part, strict=True)), terms, self.optimizer)
            self.scaler.scale(loss * (float("inf") if spoil else 1.0)).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def found(self) -> dict[str, Tensor]:
        return {**weights_of(self.model), **factors_of(self.optimizer)}


@pytest.mark.parametrize(
    ("fields", "clip"), [*((fields, 0.1) for fields in SCALED), ({"fisher": "empirical"}, None)], ids=str
)
def test_the_scale_of_the_loss_is_nothing_to_factors_rates_and_weights(
    fields: dict[str, Any], clip: float | None
) -> None:
    plain, scaled = Loop(fields, None, clip), Loop(fields, 2.0**10, clip)
    for seed in range(3):
        for loop in (plain, scaled):
            loop.step(seed, parts=2)
    assert equal(plain.found(), scaled.found())


@pytest.mark.parametrize(
    ("fields", "late"), [*((fields, False) for fields in SCALED), ({"fisher": "empirical"}, True)], ids=str
)
def test_of_a_step_that_is_left_out_nothing_is_kept(
    fields: dict[str, Any], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """late: gradients of the step left out are there yet when the next forward pass is made."""
    if fields.get("preset") == "lngd_lr":  # draws were made; what they gave is dropped
        monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    plain, skipping = Loop(fields, 2.0**4), Loop(fields, 2.0**4)
    skipping.step(9, spoil=True)  # before the first step, too
    for seed in range(3):
        plain.step(seed)
        skipping.step(seed)
        for more in range(2):  # twice: the second begins with what the first left
            skipping.step(7 + more, parts=2, spoil=True)
            for p in skipping.model.parameters() if late else ():
                p.grad = torch.full_like(p, torch.nan)
        assert float(skipping.scaler.get_scale()) == 2.0 ** (3 - 2 * (seed + 1))
        if late:
            skipping.model.zero_grad()
    plain.step(5)
    skipping.step(5)
    assert equal(plain.found(), skipping.found())
    assert skipping.optimizer.diagnostics()["skipped_factors"] == 0


def test_parts_of_a_model_that_are_called_by_themselves_begin_anew() -> None:
    found = []
    for spoil in (False, True):
        model, x = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), torch.ones(6, 4)
        optimizer, scaler = LNGD(model, lr=1e-2, **EVERY_STEP), scaler_of(8.0)
        for scale in (1.0, *([float("inf")] if spoil else []), 1.0):
            scaler.scale(model[1](model[0](x * min(scale, 3.0))).square().mean() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(factors_of(optimizer))
    assert equal(*found)


def test_a_question_that_no_scaler_asks_changes_nothing() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(4, 4))), torch.randn(6, 4)
    optimizer = LNGD(model, lr=0.0, **EVERY_STEP)
    model(x).sum().backward()
    getattr(optimizer, "_step_supports_amp_scaling", None)  # torch's own name: what a GradScaler asks any optimizer
    model(3 * x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors("0")["phi"], 4 * (5 * x.mT @ x / 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["lngd", "kfac"])
def test_under_accelerates_wrapper(family: str) -> None:
    """accelerate has no fp16 on the CPU: its wrapper is given the scaler by hand."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    fields = {**EVERY_STEP, "family": family, "rate": "adaptive", "direction": "natural"}
    found = []
    for scale in (None, 2.0**8):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        scaler = None if scale is None else scaler_of(scale)
        inner = LNGD(model, lr=1e-2, **fields)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        for spoil in (False, False) if scaler is None else (False, True, False):
            loss = model(x * (100.0 if spoil else 1.0)).square().mean()
            loss = loss if scaler is None else scaler.scale(loss * (float("inf") if spoil else 1.0))
            loss.backward()
            optimizer.step()
            assert optimizer.step_was_skipped == spoil
            optimizer.zero_grad()
        found.append({**weights_of(model), **factors_of(inner)})
    assert equal(*found)


# How far factors are from those of float32: each precision with each of model, micro-batches, checkpointing and what is
# estimated; all of their product is measured by `benchmarks.cost.precision`.

FULL, BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS = "float32", "bf16 autocast", "fp16 autocast, scaler", "bf16 weights"
CHECKPOINTING: dict[str, bool | None] = {"off": None, "non-reentrant": False, "reentrant": True}
# What is estimated: in the forward pass; from gradients.
FORWARD: dict[str, Any] = {"preset": "paper", "fisher": "expected", "rate": "none"}
GRADIENTS: dict[str, Any] = {"family": "kfac", "rate": "adaptive"}
STEPS = 2
# Gradients overflow at this scale, so that the first steps are left out, as when training begins.
FIRST_SCALE = 2.0**22
# Of Φ and Ψ; of KFAC's factors, and of the rates of Eq. 12-13: gradients carry what the layers above have rounded.
BOUNDS = {FULL: 1e-5, BF16_AUTOCAST: 1e-2, FP16_AUTOCAST: 4e-3, BF16_WEIGHTS: 1.5e-2}
GRADIENT_BOUNDS = {FULL: 1e-5, BF16_AUTOCAST: 3e-2, FP16_AUTOCAST: 2e-2, BF16_WEIGHTS: 5e-2}


def batch_of(kind: str, seed: int) -> dict[str, Tensor]:
    """16 sentences, some of them padded, or 16 images of noise."""
    if kind == "Marian":
        return marian_batch(seed, rows=16)
    draw = torch.Generator().manual_seed(seed)
    pixels, labels = torch.randn(16, 3, 8, 8, generator=draw), torch.randint(0, 3, (16,), generator=draw)
    return {"pixel_values": pixels, "labels": labels}


def measured(
    kind: str, precision: str, accumulation: int, checkpointing: str, fields: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Factors, and the mean of the layers' rates, after two steps that move nothing, as the Trainer makes them: clipped
    by norm; and how many steps the scaler left out."""
    model: Any = tiny_marian().float() if kind == "Marian" else hf_vit()
    model = model.to(BF16) if precision == BF16_WEIGHTS else model
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    optimizer = LNGD(model, lr=0.0, **{**EVERY_STEP, **fields})
    scaler = GradScaler("cpu", init_scale=FIRST_SCALE, enabled=precision == FP16_AUTOCAST)
    half = torch.float16 if precision == FP16_AUTOCAST else BF16
    made = tries = 0
    while made < STEPS:
        batch = batch_of(kind, made)
        if precision == BF16_WEIGHTS:
            batch = {name: v.to(BF16) if v.is_floating_point() else v for name, v in batch.items()}
        terms = (batch["labels"] != IGNORED).sum()
        for part in zip(*(value.chunk(accumulation) for value in batch.values()), strict=True):
            with torch.autocast("cpu", half, enabled=precision in (BF16_AUTOCAST, FP16_AUTOCAST)):
                loss = loss_of(model, dict(zip(batch, part, strict=True)), terms)
            scaler.scale(loss.float()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        made, tries = made + (scaler.get_scale() >= before), tries + 1
    found = factors_of(optimizer) | {"rate": torch.tensor(optimizer.diagnostics()["direction_scale_mean"])}
    optimizer.close()
    return found, tries - STEPS


def gap(found: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The greatest relative difference, ‖X − X₃₂‖ / ‖X₃₂‖."""
    assert found.keys() == plain.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in plain.items())


@cache
def plain(kind: str, gradients: bool) -> dict[str, Tensor]:
    with every_sample():
        return measured(kind, FULL, 1, "off", GRADIENTS if gradients else FORWARD)[0]


PAIRS = [
    *((kind, precision, 2, "non-reentrant", kind == "ViT") for kind in ("Marian", "ViT") for precision in BOUNDS),
    *(("Marian", precision, 1, "off", True) for precision in (BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS)),
    *(("ViT", precision, 2, "reentrant", False) for precision in BOUNDS),
    ("ViT", FULL, 1, "reentrant", True),
]


@pytest.mark.parametrize(("kind", "precision", "accumulation", "checkpointing", "gradients"), PAIRS)
def test_factors_in_every_precision(
    kind: str, precision: str, accumulation: int, checkpointing: str, gradients: bool
) -> None:
    fields = GRADIENTS if gradients else FORWARD
    with every_sample():
        found, left_out = measured(kind, precision, accumulation, checkpointing, fields)
    assert gap(found, plain(kind, gradients)) < (GRADIENT_BOUNDS if gradients else BOUNDS)[precision]
    assert (left_out > 0) == (precision == FP16_AUTOCAST)


# Weights in bfloat16: the state is float32, small updates add up, whatever a weight is assigned to

HALF: list[dict[str, Any]] = [
    {},
    {"bias": "factor"},
    {"embedding": "exact", "momentum_on": "update", "rate_scale": 0.2},
    {"family": "kfac", "rate": "rms", "embedding": "fallback"},
]


class Grid(nn.Module):
    """Every kind of parameter; all weights begin at 1 or −1, where bfloat16 has steps of 2⁻⁸ inwards."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.norm, self.outer = (
            nn.Embedding(6, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4),
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randint(0, 2, p.shape, generator=draw).float() * 2 - 1

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.norm(torch.tanh(self.inner(self.table(ids)))))


def on_the_grid(dtype: torch.dtype, steps: int = 60, **fields: Any) -> tuple[dict[str, Tensor], nn.Module, LNGD]:
    """The way that each weight has gone, the model and its optimizer."""
    model = Grid().to(dtype)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, **{"lr": 1e-4, "weight_decay": 0.0, **fields})
    draw = torch.Generator().manual_seed(1)
    ids, wanted = torch.randint(0, 6, (16, 3), generator=draw), torch.randn(16, 3, 4, generator=draw)
    for _ in range(steps):
        (model(ids).float() * wanted).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() - start[name] for name, p in model.named_parameters()}, model, optimizer


@pytest.mark.parametrize("fields", HALF, ids=str)
def test_small_updates_add_up_in_bfloat16(fields: dict[str, Any]) -> None:
    """Each is less than the gap between numbers; the weights go where float32 goes, which is 1."""
    full, found = (on_the_grid(dtype, steps=120, **fields)[0] for dtype in (torch.float32, BF16))
    for name, way in full.items():
        assert 0.7 < float((found[name] * way).sum() / way.square().sum()) < 1.3, name


def overwritten(model: nn.Module, numbers: dict[str, Tensor], how: str) -> None:
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


@pytest.mark.parametrize(
    ("how", "what"), [("load_state_dict", "others"), ("copy_", "zeros"), ("data.copy_", "others"), ("data", "zeros")]
)
def test_weights_that_were_written_over_are_those_that_were_written(how: str, what: str) -> None:
    """No rest of the old ones comes back: at a rate of 0 nothing changes."""
    _, model, optimizer = on_the_grid(BF16, steps=5)
    make = torch.zeros_like if what == "zeros" else torch.randn_like
    numbers = {name: make(value) for name, value in model.state_dict().items()}
    overwritten(model, numbers, how)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(torch.arange(6).view(2, 3)).float().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if what == "zeros":
            assert not p.any(), name
        else:  # within rounding: half a gap goes to the even number
            torch.testing.assert_close(p.detach(), numbers[name], rtol=2**-7, atol=0.0, msg=name)


def test_a_state_may_be_loaded_before_its_weights() -> None:
    _, model, optimizer = on_the_grid(BF16, steps=5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    found = []
    for order in ((0, 1), (1, 0)):
        _, again, resumed = on_the_grid(BF16, steps=0)
        for which in order:
            (again, resumed)[which].load_state_dict(copy.deepcopy(saved[which]))
        for _ in range(3):
            again(torch.arange(6).view(2, 3)).float().square().sum().backward()
            resumed.step()
            resumed.zero_grad()
        found.append(again)
    assert equal(*found)


# A model that is moved: its state follows


# Products in bfloat16 where a device is fast at them, the same state everywhere

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def trained(steps: int = 4) -> tuple[nn.Module, LNGD, set[torch.dtype]]:
    """A model, its optimizer, and the dtypes of the products of its last step, which updates no factors."""
    model = tiny_marian().float()
    optimizer = LNGD(model, lr=2e-3, factor_interval=100, inverse_interval=100, update_interval=1)
    watch = Products()
    for seed in range(steps):
        model(**marian_batch(seed)).loss.backward()
        if seed < steps - 1:
            optimizer.step()
        else:
            with watch:
                optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, watch.dtypes


def test_a_checkpoint_goes_from_one_cpu_to_another() -> None:
    """Products are in bfloat16 where the CPU has instructions for it; the state has the same tensors on both."""
    with cpu_with("avx512_bf16"):
        model, optimizer, products = trained()
        state = optimizer.state_dict()
        there = {name: (value.shape, value.dtype) for name, value in tensors_of(state).items()}
    assert BF16 in products
    with cpu_with():
        other, slow, products = trained(steps=1)
        assert {name: (value.shape, value.dtype) for name, value in tensors_of(slow.state_dict()).items()} == there
        other.load_state_dict(model.state_dict())
        slow.load_state_dict(through_a_file(state))
        before = weights_of(model)
        train_step(other, slow, marian_batch(9))
    assert products == {torch.float32}
    with cpu_with("avx512_bf16"):
        train_step(model, optimizer, marian_batch(9))
    after = weights_of(model)
    moved = distance(before, after)  # a small model: much is rounding
    assert 0 < distance(weights_of(other), after) < 0.5 * moved
