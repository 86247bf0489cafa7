"""`matrix_dtype=auto`: products in bfloat16 where a device is fast at them, the same state everywhere."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.precision import fast_bfloat16, product_dtype, root_dtype
from tests.test_state_dict import flat, reload

BF16, CPU = torch.bfloat16, torch.device("cpu")
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


def cpu_with(*names: str) -> Any:
    """A CPU that has these instructions for bfloat16 alone."""
    capabilities = {"avx512_f": True, "architecture": "x86_64"} | {name: name in names for name in INSTRUCTIONS}
    return patch.object(torch.cpu, "get_capabilities", lambda: capabilities)


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def trained(steps: int = 4, **fields: Any) -> tuple[nn.Module, LNGD, set[torch.dtype]]:
    """A model, its optimizer, and the dtypes of the products of its last step, which looks at no factors."""
    model = core_marian().float()
    optimizer = LNGD(model, lr=2e-3, factor_interval=100, inverse_interval=100, early_factors=False, **fields)
    watch = Products()
    for seed in range(steps):
        model(**core_batch(seed)).loss.backward()
        if seed < steps - 1:
            optimizer.step()
        else:
            with watch:
                optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, watch.dtypes


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_cpu_is_asked_for_its_instructions(name: str) -> None:
    with cpu_with(name):
        assert fast_bfloat16(CPU)
    with cpu_with():
        assert not fast_bfloat16(CPU)


def test_cuda_is_asked_for_its_generation() -> None:
    for generation, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        with patch.object(torch.cuda, "get_device_capability", lambda _, g=generation: g):
            assert fast_bfloat16(torch.device("cuda")) is fast
    assert fast_bfloat16(torch.device("mps")) and fast_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(
    ("choice", "names", "expected"),
    [
        ("auto", ("avx512_bf16",), BF16),
        ("auto", (), torch.float32),
        ("bfloat16", (), BF16),
        ("full", ("avx512_bf16",), torch.float32),
    ],
)
def test_what_a_choice_means(choice: str, names: tuple[str, ...], expected: torch.dtype) -> None:
    config = LNGDConfig(matrix_dtype=choice)
    with cpu_with(*names):
        assert product_dtype(config, torch.float32, CPU) == expected
        assert product_dtype(config, torch.float64, CPU) == root_dtype(config, torch.float64) == torch.float64
        assert root_dtype(config, torch.float32) == (torch.float32 if choice == "full" else BF16)


@pytest.mark.parametrize("direction", ["polar", "gram"])
def test_a_step_takes_its_products_as_the_cpu_can(direction: str) -> None:
    seen = {}
    for names in ((), ("avx512_bf16",)):
        with cpu_with(*names):
            seen[names] = trained(direction=direction)[2]
    assert seen[()] == {torch.float32}
    assert BF16 in seen["avx512_bf16",]


@pytest.mark.parametrize("direction", ["polar", "gram"])
def test_a_checkpoint_goes_from_one_cpu_to_another(direction: str) -> None:
    """The state has the same tensors on both, and training goes on where rounding lets it."""
    with cpu_with("avx512_bf16"):
        model, optimizer, _ = trained(direction=direction)
        state = optimizer.state_dict()
        there = {name: (value.shape, value.dtype) for name, value in flat(state).items()}
    with cpu_with():
        other, slow, _ = trained(direction=direction, steps=1)
        assert {name: (value.shape, value.dtype) for name, value in flat(slow.state_dict()).items()} == there
        other.load_state_dict(model.state_dict())
        slow.load_state_dict(reload(state))
        before = weights(model)
        core_step(other, slow, core_batch(9))
    with cpu_with("avx512_bf16"):
        core_step(model, optimizer, core_batch(9))
    moved = (weights(model) - before).norm()
    assert 0 < (weights(model) - weights(other)).norm() < 0.5 * moved  # a small model: much is rounding


def test_full_precision_differs_from_auto_by_kept_roots_alone() -> None:
    """Without the instructions `auto` rounds what it keeps, as bfloat16 does, and nothing else."""
    with cpu_with():
        auto, full = trained(steps=6)[0], trained(steps=6, matrix_dtype="full")[0]
        half = trained(steps=6, matrix_dtype="bfloat16")[0]
    start = weights(core_marian().float())
    moved = (weights(full) - start).norm()
    assert (weights(auto) - weights(full)).norm() < 0.5 * (weights(half) - weights(full)).norm() < 0.2 * moved
