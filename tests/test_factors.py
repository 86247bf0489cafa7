"""Captured factors against the dense layer-wise Fisher, over a table of layers."""

from __future__ import annotations

import pytest
import torch
from core_helpers import core_batch, core_marian, core_step
from hf_helpers import hf_seq2seq_model, hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blockwise, dense_fisher, factors
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

from hf_lngd import LNGD
from hf_lngd.curvature.factors import block_layout, from_blocks, orthogonalize, to_blocks
from hf_lngd.curvature.links import activation_derivative, is_elementwise

ACTIVATIONS = {
    "none": None,
    "relu": nn.ReLU(),
    "relu_inplace": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "silu_inplace": nn.SiLU(inplace=True),
    "elu_inplace": nn.ELU(inplace=True),
    "tanh": nn.Tanh(),
}


class OneLayer(nn.Module):
    """Linear, maybe an activation."""

    def __init__(self, d: int, m: int, bias: bool, activation: nn.Module | None) -> None:
        super().__init__()
        self.linear = nn.Linear(d, m, bias=bias)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        s = self.linear(x)
        return s if self.act is None else self.act(s)


class Gated(nn.Module):
    """act(W₀x) · W₁x."""

    def __init__(self) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.act = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.wi_0(x)) * self.wi_1(x)


def capture(model: nn.Module, x: Tensor, **fields: object) -> LNGD:
    optimizer = LNGD(model, lr=0.0, **fields)
    model(x).square().mean().backward()
    optimizer.step()
    return optimizer


def expected(model: OneLayer, x: Tensor, bias_in_factor: bool) -> tuple[Tensor, Tensor]:
    """Inputs and g² of every position."""
    a = x.reshape(-1, x.shape[-1]).double()
    s = (a @ model.linear.weight.double().T + (0 if model.linear.bias is None else model.linear.bias)).detach()
    g2 = torch.ones_like(s)
    if model.act is not None:
        derivative = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda z: type(model.act)()(z))))
        g2 = derivative(s).square()
    return (torch.cat((a, torch.ones(len(a), 1).double()), 1) if bias_in_factor else a), g2


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 2, 5)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", ["none", "factor", "fallback"])
def test_factors_are_those_of_the_dense_fisher(shape: tuple[int, ...], activation: str, bias: str) -> None:
    torch.manual_seed(0)
    model = OneLayer(5, 4, bias != "none", ACTIVATIONS[activation]).double()
    x = torch.randn(*shape, dtype=torch.float64)
    optimizer = capture(model, x, bias="factor" if bias == "factor" else "fallback")
    found = optimizer.factors("linear")
    a, g2 = expected(model, x, bias == "factor")
    phi, psi = factors(a, g2)
    torch.testing.assert_close(found["phi"], phi, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["psi"], psi, rtol=1e-10, atol=1e-12)
    fisher = dense_fisher(a, g2)
    torch.testing.assert_close(found["psi"].sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(torch.kron(found["phi"], torch.diag(found["psi"])).trace(), fisher.trace())
    assert torch.linalg.eigvalsh(found["phi"]).min() > -1e-12


def test_gate_is_differentiated_and_its_partner_is_not() -> None:
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(7, 5, dtype=torch.float64)
    optimizer = capture(model, x)
    s = (x @ model.wi_0.weight.T).detach()
    sigma = torch.sigmoid(s)
    derivative = sigma * (1 + s * (1 - sigma))
    torch.testing.assert_close(optimizer.factors("wi_0")["phi"], factors(x, derivative.square())[0])
    torch.testing.assert_close(optimizer.factors("wi_1")["phi"], factors(x, torch.ones_like(s))[0])


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("bias", ["factor", "fallback"])
def test_a_wide_factor_is_cut_into_equal_blocks(limit: int, bias: str) -> None:
    torch.manual_seed(0)
    model, x = OneLayer(7, 4, True, None).double(), torch.randn(9, 7, dtype=torch.float64)
    optimizer = capture(model, x, max_factor_dim=limit, bias=bias)
    a, g2 = expected(model, x, bias == "factor")
    k, b = block_layout(a.shape[1], limit)
    assert b <= limit
    torch.testing.assert_close(optimizer.factors("linear")["phi"], blockwise(factors(a, g2)[0], k, b))


ELEMENTWISE = [
    "ELU",
    "Hardswish",
    "LeakyReLU",
    "LogSigmoid",
    "ReLU6",
    "SELU",
    "Sigmoid",
    "Mish",
    "Softplus",
    "Softsign",
]


@pytest.mark.parametrize("name", [*ELEMENTWISE, *sorted(ACT2FN)])
def test_derivative_of_every_activation(name: str) -> None:
    activation = ACT2FN[name] if name in ACT2FN else getattr(nn, name)()
    if name in ("prelu", "xielu", "softmax"):  # parameters of their own, or not entry by entry
        assert not is_elementwise(activation)
        return
    assert is_elementwise(activation)
    s = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(s).sum(), s)
    torch.testing.assert_close(activation_derivative(activation, s), slope)


def tiny_model(family: str) -> nn.Module:
    if family == "marian":
        return core_marian()
    if family != "t5-gated":
        return hf_seq2seq_model(family, hf_tokenizer()).double().train()
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).double().train()


SLOPES = {"fc1": torch.relu, "wi": torch.relu, "wi_0": lambda s: nn.functional.gelu(s, approximate="tanh")}


@pytest.mark.parametrize("source", [6, 7], ids=["equal lengths", "unlike lengths"])
@pytest.mark.parametrize("family", ["marian", "t5", "bart", "t5-gated"])
def test_every_layer_of_a_transformer(family: str, source: int) -> None:
    model = tiny_model(family)
    batch = core_batch(source=source, target=6)
    labels = batch["labels"]
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 9, torch.where(labels < 0, labels, labels % 9)
    slopes = SLOPES | ({"fc1": nn.functional.gelu} if family == "bart" else {})
    optimizer = LNGD(model, lr=0.0, exclude=r"lm_head|shared")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in optimizer._capture.layers:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, o, name=name: seen.update({name: (a[0].detach(), o.detach())})
        )
    core_step(model, optimizer, batch)
    assert len(seen) == len(optimizer._capture.layers) >= 16
    for name, (a, s) in seen.items():
        cross = ("encoder_attn" in name or "EncDecAttention" in name) and name.split(".")[-1][0] in "kv"
        mask = batch["attention_mask"].bool() if cross or "decoder" not in name else labels != -100
        g2, kind = torch.ones_like(s), name.rsplit(".", 1)[1]
        if kind in slopes:
            leaf = s.clone().requires_grad_()
            g2 = torch.autograd.grad(slopes[kind](leaf).sum(), leaf)[0].square()
        phi, psi = factors(a[mask], g2[mask])
        found = optimizer.factors(name)
        torch.testing.assert_close(found["phi"], phi, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(found["psi"], psi, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_sums_leave_autocast(activation: str) -> None:
    torch.manual_seed(0)
    model, x = OneLayer(5, 4, False, ACTIVATIONS[activation]), torch.randn(64, 5)
    found = []
    for enabled in (False, True):
        optimizer = LNGD(model, lr=0.0, factor_interval=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.close()
        found.append(optimizer.factors("linear")["phi"])
    # φ' sees the output in half precision, the sums never do
    torch.testing.assert_close(
        *found, rtol=1e-6 if activation == "none" else 5e-3, atol=1e-6 if activation == "none" else 5e-3
    )


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 40), limit=st.integers(1, 50), rows=st.integers(1, 4))
def test_blocks_lose_nothing(columns: int, limit: int, rows: int) -> None:
    k, b = block_layout(columns, limit)
    assert b <= limit and k * b >= columns
    x = torch.randn(2, rows, columns)
    assert torch.equal(from_blocks(to_blocks(x, k, b), columns), x)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 999))
def test_invariants_hold_for_any_layer(n: int, d: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = OneLayer(d, m, True, nn.GELU()).double(), torch.randn(n, d, dtype=torch.float64)
    optimizer = capture(model, x, bias="factor")
    found = optimizer.factors("linear")
    a, g2 = expected(model, x, True)
    torch.testing.assert_close(found["psi"].sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(found["phi"].trace(), (a.square().sum(1) * g2.sum(1)).mean())
    assert torch.linalg.eigvalsh(found["phi"]).min() > -1e-9 * found["phi"].trace()


def test_running_average_is_corrected_for_its_start() -> None:
    torch.manual_seed(0)
    model = OneLayer(5, 4, False, None).double()
    optimizer = LNGD(model, lr=0.0, factor_interval=1, ema_decay=0.9)
    batches = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
    weights = [0.1 * 0.9 ** (2 - i) for i in range(3)]
    total = sum(w * factors(x, torch.ones(6, 4))[0] for w, x in zip(weights, batches, strict=True)) / sum(weights)
    torch.testing.assert_close(optimizer.factors("linear")["phi"], total)


def test_a_model_without_storage_can_be_sized() -> None:
    with torch.device("meta"):
        model = OneLayer(8, 8, False, None)
        optimizer = capture(model, torch.randn(4, 8))
    assert optimizer.memory_usage()["momentum"] == 4 * 64


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6), (1, 7, 7), (3, 1, 4), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthogonalize_is_the_polar_factor(shape: tuple[int, ...], scale: float) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double(), False)
    values = torch.logspace(-2, 0, u.shape[-1]).double()
    found = u.mT @ orthogonalize((u * values) @ vh * scale) @ vh.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=1e-9)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=0.15)
    if min(shape[1:]) == 1:
        torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 64, 576), (2, 128, 1152), (2, 256, 256), (1, 1040, 1040)], ids=str)
def test_half_precision_does_not_blow_up(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    assert torch.linalg.svdvals(orthogonalize(x.bfloat16()).float()).max() < 1.16


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
