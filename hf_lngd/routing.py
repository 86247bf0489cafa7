"""Which parameter goes to LNGD and which to the fallback, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from .adapters import adapter_reason
from .checks import check_precision
from .config import LNGDConfig
from .curvature.compiled import plain_name
from .curvature.layers import Geometry, Layer, geometry_of

LNGD_OWNER = "lngd"
FALLBACK_OWNER = "fallback"
FROZEN_OWNER = "frozen"

EMBEDDING = "embedding"
EXACT_EMBEDDING = "embedding, exact"
ROTATED_EMBEDDING = "embedding, rotated"

# An eigenbasis costs about 10·d³ operations a factor step.
WIDEST_ROTATION = 2048


@dataclass(frozen=True)
class Route:
    """One parameter's owner.

    Attributes:
        parameter: its first name in the model.
        owner: ``lngd``, ``fallback`` (AdamW) or ``frozen``.
        layer: the module it belongs to.
        reason: why: linear, bias in the factor, embedding, norm, bias, position, excluded, adapter, unsupported
            module, …
        decays: weight decay applies.
        follows: what LNGD found to follow the layer, whose derivative enters its factors: ``batch_norm → relu``;
            ``identity`` where nothing that it knows does; empty before the first step and where AdamW owns.
    """

    parameter: str
    owner: str
    layer: str
    reason: str
    shape: tuple[int, ...]
    numel: int
    decays: bool
    follows: str = ""


@dataclass
class Routing:
    """The outcome: routes of all parameters, the layers LNGD owns, the embeddings with a rule of their own, and the
    first home of each parameter: wrappers (FSDP2) put others there after the optimizer is made."""

    routes: list[Route]
    layers: list[Layer]
    embeddings: list[tuple[str, list[nn.Embedding]]]
    homes: dict[str, tuple[nn.Module, str]]


def route(model: nn.Module, config: LNGDConfig) -> Routing:
    """Give each parameter of the model an owner, in the order of `model.named_parameters()`.

    Names are those from before torch.compile. Tied parameters have one route, under their first name; a weight that is
    both an embedding and a head is an embedding. Parameters that do not require a gradient are ``frozen``.

    Raises:
        ValueError: a parameter that cannot be trained here: complex, float16, not initialized, of sparse gradients.
        RuntimeError: one that DeepSpeed has partitioned.
    """
    homes = _homes(model)
    around = {plain_name(name): module for name, module in model.named_modules()}
    exclude = re.compile(config.exclude) if config.exclude else None
    routing = Routing([], [], [], {})
    layer_of: dict[int, Layer] = {}
    for compiled_name, parameter in model.named_parameters():
        name = plain_name(compiled_name)
        # peft's MultiheadAttention makes its frozen weights anew whenever its modules are listed
        module_name, _, attribute = name.rpartition(".")
        modules = homes.setdefault(id(parameter), [(module_name, around[module_name], attribute)])
        routing.homes[name] = modules[0][1:]
        _check(name, parameter, modules)
        owner, reason, decays = _decide(name, parameter, homes, config, exclude, around)
        if reason in (EXACT_EMBEDDING, ROTATED_EMBEDDING):
            routing.embeddings.append((name, [m for _, m, _ in modules if isinstance(m, nn.Embedding)]))
        elif owner == LNGD_OWNER:
            _place(name, parameter, modules, layer_of, routing)
        routing.routes.append(
            Route(name, owner, modules[0][0], reason, tuple(parameter.shape), parameter.numel(), decays)
        )
    return routing


Homes = list[tuple[str, nn.Module, str]]


def _homes(model: nn.Module) -> dict[int, Homes]:
    """Every place of every parameter: id → [(module name, module, attribute)]."""
    homes: dict[int, Homes] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append((plain_name(name), module, attribute))
    return homes


def _check(name: str, parameter: nn.Parameter, modules: Homes) -> None:
    if hasattr(parameter, "ds_id"):
        raise RuntimeError(
            f"LNGD: parameter '{name}' is one that DeepSpeed (ZeRO-3) has split, accepted: whole parameters (DDP), "
            "or those of FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if is_lazy(parameter):
        raise ValueError(f"{name}: got a parameter without a shape yet, accepted: a model that was called once")
    if parameter.requires_grad and parameter.is_complex():
        raise ValueError(f"{name}: got {parameter.dtype}, accepted: real numbers (or requires_grad=False)")
    if parameter.requires_grad and any(getattr(module, "sparse", False) is True for _, module, _ in modules):
        raise ValueError(f"{name}: got an embedding with sparse=True, accepted: sparse=False")
    if parameter.requires_grad:
        check_precision(name, parameter)


def _decide(
    name: str,
    parameter: nn.Parameter,
    homes: dict[int, Homes],
    config: LNGDConfig,
    exclude: re.Pattern[str] | None,
    around: Mapping[str, nn.Module],
) -> tuple[str, str, bool]:
    """(owner, reason, weight decay)."""
    if not parameter.requires_grad:
        return FROZEN_OWNER, "frozen", False
    modules = homes[id(parameter)]
    module_name, module, attribute = modules[0]
    plain = parameter.dim() < 2
    if any("norm" in type(m).__name__.lower() for _, m, _ in modules):
        return FALLBACK_OWNER, "norm", False
    if exclude is not None and exclude.search(name):
        return FALLBACK_OWNER, "excluded", not plain
    adapter = adapter_reason(module_name, around, geometry_of(module))
    if adapter is not None:
        vector = parameter.numel() == max(parameter.shape, default=1)  # a scale, kept as [1, d] by some
        return FALLBACK_OWNER, adapter, not vector
    if any(isinstance(m, nn.Embedding) for _, m, _ in modules):
        position = any("position" in f"{type(m).__name__}.{n}".lower() for n, m, _ in modules)
        if position or config.embedding == "fallback":
            return FALLBACK_OWNER, "position" if position else EMBEDDING, True
        if config.embedding == "exact":
            return LNGD_OWNER, EXACT_EMBEDDING, True
        narrow = parameter.shape[-1] <= WIDEST_ROTATION
        return FALLBACK_OWNER, ROTATED_EMBEDDING if narrow else f"{EMBEDDING}, too wide to rotate", True
    geometries = {None if _inside_attention(m) else geometry_of(m) for _, m, _ in modules}
    geometry = geometries.pop() if len(geometries) == 1 else None
    if geometry is not None:
        if attribute == "weight":
            return LNGD_OWNER, _kind(geometry), True
        if attribute == "bias" and config.bias == "factor" and len(modules) == 1:
            # a weight that several modules share, or an embedding's, has no one bias for its last column
            weight, weight_name = module._parameters["weight"], f"{module_name}.weight".removeprefix(".")
            if weight is not None and len(homes[id(weight)]) == 1:
                weight_owner, weight_reason, _ = _decide(weight_name, weight, homes, config, exclude, around)
                if (weight_owner, weight_reason) == (LNGD_OWNER, _kind(geometry)):
                    return LNGD_OWNER, "bias in the factor", False
    if attribute == "bias" or plain:
        return FALLBACK_OWNER, "bias" if attribute == "bias" else "vector", False
    if "position" in name.lower():
        return FALLBACK_OWNER, "position", True
    return FALLBACK_OWNER, f"unsupported module {type(module).__name__}", True


def _kind(geometry: Geometry) -> str:
    """The reason that the routing table gives."""
    if geometry.window is None:
        return "linear"
    if geometry.units == 1:
        return "convolution"
    return "depthwise convolution" if geometry.out_features == 1 else "grouped convolution"


def _inside_attention(module: nn.Module) -> bool:
    # torch's MultiheadAttention reads its output projection's weight and never calls it, so no hook would fire
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def _place(name: str, parameter: nn.Parameter, modules: Homes, layer_of: dict[int, Layer], routing: Routing) -> None:
    module_name, module, attribute = modules[0]
    layer = layer_of.get(id(module))
    if layer is None:
        geometry = geometry_of(module)
        assert geometry is not None
        layer = layer_of[id(module)] = Layer(module_name, name, None, geometry)  # weight or bias may come first
        routing.layers.append(layer)
    if attribute == "weight":
        layer.weight_name = name
        layer.modules = [(n, m) for n, m, _ in modules]
        for _, m, _ in modules:
            layer_of[id(m)] = layer
    else:
        layer.bias_name = name


def format_routes(routes: list[Route]) -> str:
    """The routing as a table, one line a kind of owner and reason, shares of all parameters, names abbreviated.

    After the first step a second table tells what was found to follow LNGD's layers.
    """
    total = sum(r.numel for r in routes) or 1
    kinds: dict[tuple[str, str], list[Route]] = {}
    followed: dict[str, list[Route]] = {}
    for r in routes:
        kinds.setdefault((r.owner, r.reason), []).append(r)
        if r.follows and r.decays:  # each layer once: by its weight
            followed.setdefault(r.follows, []).append(r)
    rows = [("owner", "reason", "tensors", "parameters", "share", "for example")]
    for (owner, reason), members in sorted(kinds.items(), key=lambda item: (item[0][0] != LNGD_OWNER, item[0])):
        count = sum(r.numel for r in members)
        share = f"{100 * count / total:.1f} %"
        rows.append((owner, reason, str(len(members)), f"{count:,}", share, members[0].parameter))
    text = _align(rows, right={2, 3, 4})
    if followed:
        lines = [("followed by", "layers", "for example")]
        lines += [(name, str(len(members)), members[0].layer) for name, members in sorted(followed.items())]
        text += "\n\n" + _align(lines, right={1})
    return text


def format_rates(config: LNGDConfig) -> str:
    """What a rate `lr` means for each owner, and the weight decays: two short sentences."""
    given = config.fallback_lr
    rest = f"{config.fallback_lr_scale:g} × lr" if given is None else f"{given:g}"
    own = config.weight_decay * config.weight_decay_scale
    return (
        f"Rate of LNGD's layers: lr, weight decay {own:g}. "
        f"Of all else: {rest}, weight decay {config.weight_decay:g}; none on norms and biases."
    )


def _align(rows: Sequence[tuple[str, ...]], right: set[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
