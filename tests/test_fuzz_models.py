"""Random chains of supported layers under random settings: three steps are those of the dense float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from tests.reference import NaiveLayer

ACTS: dict[str, type[nn.Module] | None] = {
    "none": None,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}
# What a link of the chain is; all take and give [B, T, width].
KINDS = ("linear", "convolution", "shared", "twice", "gated", "norm", "residual")


class Link(nn.Module):
    """One link of a chain: a layer or several, and perhaps an activation."""

    def __init__(self, kind: str, width: int, to: int, act: str, bias: bool) -> None:
        super().__init__()
        self.kind, made = kind, ACTS[act]
        same = kind in ("twice", "norm", "residual")
        self.width = width if same else to
        if kind == "norm":
            self.norm = nn.LayerNorm(width)
            return
        if kind == "convolution":
            self.layer: nn.Module = nn.Conv1d(width, to, 3, padding=1, bias=bias)
        else:
            self.layer = nn.Linear(width, self.width, bias=bias)
        if kind in ("shared", "gated"):
            self.other = nn.Linear(width, to, bias=bias)
        self.act = nn.Identity() if made is None else made()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "norm":
            return self.norm(x)
        if self.kind == "convolution":
            return self.act(self.layer(x.mT)).mT
        if self.kind == "twice":
            return self.act(self.layer(self.act(self.layer(x))))
        y = self.act(self.layer(x))
        if self.kind == "shared":
            return y + 0.5 * self.other(x)
        if self.kind == "gated":
            return y * self.other(x)
        return x + y if self.kind == "residual" else y


class ChainNet(nn.Module):
    """Links one after the other."""

    def __init__(self, width: int, links: list[tuple[str, int, str, bool]]) -> None:
        super().__init__()
        made = []
        for kind, to, act, bias in links:
            made.append(Link(kind, width, to, act, bias))
            width = made[-1].width
        made.append(Link("linear", width, 3, "none", True))  # so that there is a layer, and the norms' output is used
        self.links = nn.ModuleList(made)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for link in self.links:
            x = link(x)
        return x


def layers_of(model: ChainNet) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """Every layer that LNGD owns, and the activation that follows it."""
    found: dict[str, tuple[nn.Module, nn.Module | None]] = {}
    for i, link in enumerate(model.links):
        if link.kind != "norm":
            followed = None if isinstance(link.act, nn.Identity) else link.act
            found[f"links.{i}.layer"] = (link.layer, followed)
        if link.kind in ("shared", "gated"):
            found[f"links.{i}.other"] = (link.other, None)
    return found


def rows_of(layer: nn.Module, a: Tensor, s: Tensor, ones: bool) -> tuple[Tensor, Tensor]:
    """Inputs and pre-activations, a row a position: [B, T, d] or patches of [B, C, T]."""
    if isinstance(layer, nn.Conv1d):
        padded = torch.nn.functional.pad(a, (1, 1))
        a = torch.stack([padded[..., t : t + 3].flatten(1) for t in range(a.shape[-1])], 1)
        s = s.mT
    a, s = a.flatten(0, 1), s.flatten(0, 1)
    return (torch.cat((a, torch.ones(len(a), 1).double()), 1) if ones else a), s


def observe(model: ChainNet, batch: dict[str, Tensor], bias: str) -> dict[str, tuple[Tensor, Tensor]]:
    """a and g² of every layer over all its calls, those positions that count."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    mask = batch.get("attention_mask")
    for name, (layer, act) in layers_of(model).items():

        def see(module: nn.Module, args: Any, out: Tensor, name: str = name, act: nn.Module | None = act) -> None:
            a, s = rows_of(module, args[0].detach(), out.detach(), bias == "factor" and module.bias is not None)
            g2 = torch.ones_like(s)
            if act is not None:
                with torch.enable_grad():
                    leaf = s.clone().requires_grad_()
                    (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
                g2 = slope.square()
            keep = slice(None) if mask is None else mask.flatten() > 0
            seen.setdefault(name, []).append((a[keep], g2[keep]))

        handles.append(layer.register_forward_hook(see))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat([a for a, _ in calls]), torch.cat([g for _, g in calls])) for name, calls in seen.items()}


def matrix(layer: nn.Module, bias: str, gradient: bool = False) -> Tensor:
    """Weight or gradient as [m, columns], with the bias's column where it is in the factor."""
    parts = [layer.weight, *([layer.bias] if bias == "factor" and layer.bias is not None else [])]
    return torch.cat([(p.grad if gradient else p).detach().reshape(len(p), -1) for p in parts], 1)


links = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(2, 5), st.sampled_from(list(ACTS)), st.booleans()),
    min_size=1,
    max_size=5,
)
fields = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["natural", "polar", "gram"]),
        "rate": st.sampled_from(["rms", "trust", "none"]),
        "damping": st.sampled_from(["relative", "paper"]),
        "damping_rho": st.sampled_from([0.1, 1.0]),
        "momentum_on": st.sampled_from(["gradient", "update"]),
        "nesterov": st.booleans(),
        "momentum": st.sampled_from([0.0, 0.8]),
        "ema_decay": st.sampled_from([0.0, 0.9]),
        "row_decay": st.sampled_from([0.0, 0.9]),
        "bias": st.sampled_from(["factor", "fallback"]),
    }
)
EXACT = {"factor_interval": 1, "inverse_interval": 1, "polar_interval": 1, "stagger": False, "conv_rows": 1}


# no shrinking: a failure is found within the time of a success, its example is small as it is
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(width=st.integers(2, 5), links=links, fields=fields, masked=st.booleans(), seed=st.integers(0, 99))
def test_any_chain_steps_as_the_reference(
    width: int, links: list[tuple[str, int, str, bool]], fields: dict[str, Any], masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = ChainNet(width, links).double()
    config = LNGDConfig(**{**EXACT, **fields, "max_factor_dim": 99, "weight_decay": 0.05})
    optimizer = LNGD(model, config, lr=1e-3)
    found = layers_of(model)
    assert set(optimizer._capture.layers) == set(found)
    naive = {name: NaiveLayer(matrix(layer, config.bias), config) for name, (layer, _) in found.items()}
    for _ in range(3):
        batch = {"x": torch.randn(3, 4, width, dtype=torch.float64)}
        if masked:
            batch["attention_mask"] = (torch.rand(3, 4) < 0.7).double()
            batch["attention_mask"][0] = 1.0
        for name, (a, g2) in observe(model, batch, config.bias).items():
            naive[name].observe(a, g2)
        (model(**batch) - torch.randn(3, 4, 3, dtype=torch.float64)).square().mean().backward()
        for name, (layer, _) in found.items():
            decay = 0.05 * config.weight_decay_scale
            step_with_decay(naive[name], layer, config.bias, decay)
        optimizer.step()
        optimizer.zero_grad()
        for name, (layer, _) in found.items():
            torch.testing.assert_close(
                matrix(layer, config.bias), naive[name].w, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def step_with_decay(naive: NaiveLayer, layer: nn.Module, bias: str, decay: float) -> None:
    """The reference's step; decay is of weights, and of no bias."""
    before = naive.w[:, -1].clone()
    has_column = bias == "factor" and layer.bias is not None
    naive.step(matrix(layer, bias, gradient=True), 1e-3, decay)
    if has_column:
        naive.w[:, -1] += before * 1e-3 * decay
