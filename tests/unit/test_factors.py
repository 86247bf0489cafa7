"""Factors of layers against dense sums over positions: of the default, whose φ' is 1, and of the natural direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from hf_lngd import LNGD
from hf_lngd.linalg import block_layout
from tests.helpers import IGNORED, layers_of, marian_batch, seeded, tiny_marian, train_step
from tests.hf_helpers import hf_seq2seq_model, hf_tokenizer
from tests.reference import blockwise, factors

Seen = dict[str, tuple[Tensor, Tensor]]  # name → input and output of a module
gelu_tanh = partial(nn.functional.gelu, approximate="tanh")


class OneLayer(nn.Module):
    """Linear, maybe an activation."""

    def __init__(self, d: int, m: int, bias: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(d, m, bias=bias)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        s = self.linear(x)
        return s if self.act is None else self.act(s)


def capture(model: nn.Module, x: Tensor, **fields: Any) -> LNGD:
    """An optimizer after its first step, which leaves the weights as they are."""
    optimizer = LNGD(model, lr=0.0, **fields)
    model(x).square().mean().backward()
    optimizer.step()
    return optimizer


def inputs_of(x: Tensor, bias_in_factor: bool) -> Tensor:
    """The layer's input at each position: [N, d], or [N, d + 1]."""
    a = x.reshape(-1, x.shape[-1])
    return torch.cat((a, torch.ones(len(a), 1).double()), 1) if bias_in_factor else a


def slopes_of(model: OneLayer, x: Tensor) -> Tensor:
    """φ'² at each position: [N, m]."""
    s = model.linear(x).detach().reshape(-1, model.linear.out_features)
    if model.act is None:
        return torch.ones_like(s)
    return torch.func.vmap(torch.func.vmap(torch.func.grad(lambda z: type(model.act)()(z))))(s).square()


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
@pytest.mark.parametrize(("bias", "direction"), [("factor", "polar"), ("fallback", "natural")])
def test_a_wide_factor_is_cut_into_equal_blocks(limit: int, bias: str, direction: str) -> None:
    torch.manual_seed(0)
    model, x = OneLayer(7, 4, True, nn.Tanh()).double(), torch.randn(9, 7, dtype=torch.float64)
    optimizer = capture(model, x, max_factor_dim=limit, bias=bias, direction=direction)
    a = inputs_of(x, bias == "factor")
    g2 = slopes_of(model, x) if direction == "natural" else torch.ones(9, 4)
    k, b = block_layout(a.shape[1], limit)
    assert b <= limit
    torch.testing.assert_close(optimizer.factors("linear")["phi"], blockwise(factors(a, g2)[0], k, b))


def gated_t5() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    return seeded(lambda: T5ForConditionalGeneration(config).double())


def tiny_model(family: str) -> nn.Module:
    if family == "marian":
        return tiny_marian(encoder_layers=2, decoder_layers=2)
    return gated_t5() if family == "t5-gated" else hf_seq2seq_model(family, hf_tokenizer()).double().train()


def slope(act: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    leaf = s.clone().requires_grad_()
    return torch.autograd.grad(act(leaf).sum(), leaf)[0]


def natural_slopes(model: nn.Module, name: str, seen: Seen) -> Tensor:
    """φ' of all that follows a layer, by its name: an activation, a gate, or a norm that comes last."""
    s, (stem, kind) = seen[name][1], name.rsplit(".", 1)
    if kind in ("fc1", "wi"):
        return slope(nn.functional.gelu if "Bart" in type(model).__name__ else torch.relu, s)
    if kind == "wi_0":
        return slope(gelu_tanh, s) * seen[f"{stem}.wi_1"][1]
    if kind == "wi_1":
        return gelu_tanh(seen[f"{stem}.wi_0"][1])
    if kind in ("out_proj", "fc2"):
        norm = f"{stem}.final_layer_norm" if kind == "fc2" else f"{stem}_layer_norm"
        gamma, x = model.get_submodule(norm).weight.detach(), seen[norm][0]
        return gamma / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return torch.ones_like(s)


@pytest.mark.parametrize("family", ["marian", "t5", "bart", "t5-gated"])
@pytest.mark.parametrize("direction", ["polar", "natural"])
def test_every_layer_of_a_transformer(direction: str, family: str) -> None:
    """Source and target as long as each other in half of these, which makes their masks hard to tell apart."""
    model, batch = tiny_model(family), marian_batch(source=6 if direction == "polar" else 7)
    labels = batch["labels"]
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 9, torch.where(labels < 0, labels, labels % 9)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
    optimizer = LNGD(model, lr=0.0, exclude=r"lm_head|shared", direction=direction)
    seen: Seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(lambda m, a, o, name=name: seen.update({name: (a[0].detach(), o.detach())}))
    train_step(model, optimizer, batch)
    assert len(layers_of(optimizer)) >= 16
    for name in layers_of(optimizer):
        a, s = seen[name]
        cross = ("encoder_attn" in name or "EncDecAttention" in name) and name.split(".")[-1][0] in "kv"
        mask = batch["attention_mask"].bool() if cross or "decoder" not in name else labels != IGNORED
        g2 = natural_slopes(model, name, seen).square() if direction == "natural" else torch.ones_like(s)
        phi, psi = factors(a[mask], g2[mask])
        found = optimizer.factors(name)
        torch.testing.assert_close(found["phi"], phi, rtol=1e-9, atol=1e-12, msg=name)
        if direction == "natural":
            torch.testing.assert_close(found["psi"], psi, rtol=1e-9, atol=1e-12, msg=name)


def test_sums_leave_autocast() -> None:
    torch.manual_seed(0)
    model, x, found = OneLayer(5, 4), torch.randn(64, 5), []
    for enabled in (False, True):
        optimizer = LNGD(model, lr=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.close()
        found.append(optimizer.factors("linear")["phi"])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
