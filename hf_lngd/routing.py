"""Which parameter goes to LNGD and which to AdamW, and why: also of PEFT's adapters, tied weights, parametrizations."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .config import LNGDConfig
from .heads import heads_of
from .layers import Geometry, Layer, geometry_of
from .torch_internals import plain_name, uncompiled

LNGD_OWNER, FALLBACK_OWNER, FROZEN_OWNER = "lngd", "fallback", "frozen"
EXACT_EMBEDDING = "embedding, exact"
UNSAVED = "left out of checkpoints"
# A linear layer with so many outputs, so many times more than inputs, is taken for an output layer over a vocabulary.
VOCABULARY, VOCABULARY_RATIO = 1000, 16


@dataclass(frozen=True)
class Route:
    """What one parameter is assigned to.

    Attributes:
        parameter: its first name in the model.
        owner: ``lngd``, ``fallback`` (AdamW) or ``frozen``.
        layer: the module it belongs to.
        reason: why: linear, bias in the factor, embedding, norm, position, excluded, adapter, unsupported module, …
        decays: weight decay applies.
        follows: what LNGD found to follow the layer, whose derivative enters its factors: ``batch_norm → relu``;
            ``identity`` where nothing does; empty before the first step and where AdamW has the parameter."""

    parameter: str
    owner: str
    layer: str
    reason: str
    shape: tuple[int, ...]
    numel: int
    decays: bool
    follows: str = ""

    @property
    def kind(self) -> str | None:
        """Its kind of parameter group: ``lngd``, ``lngd_bias``, ``embedding``, ``fallback``, ``fallback_no_decay``;
        None: it is not trained."""
        if self.owner == FROZEN_OWNER:
            return None
        if self.reason == EXACT_EMBEDDING:
            return "embedding"
        if self.owner == LNGD_OWNER:
            return "lngd" if self.decays else "lngd_bias"
        return "fallback" if self.decays else "fallback_no_decay"


@dataclass
class Routing:
    """The outcome: routes of all parameters, the layers of LNGD, the embeddings with a rule of their own, every
    parameter by name, and the module and attribute where it stands: wrappers (FSDP2) put others there later."""

    routes: list[Route]
    layers: list[Layer]
    embeddings: list[tuple[str, list[nn.Embedding]]]
    parameters: dict[str, nn.Parameter]
    homes: dict[str, tuple[nn.Module, str]]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen, by name."""
        return {r.parameter: self.parameters[r.parameter] for r in self.routes if r.kind is not None}

    def current(self) -> dict[str, Any]:
        """What stands in the model now, by name: wrappers put others in the parameters' places, or take them away."""
        return {name: module._parameters.get(attribute) for name, (module, attribute) in self.homes.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within torch.compile's and DDP's: names are those that it gives its parameters."""
    inner = model.module if isinstance(model, DistributedDataParallel) else uncompiled(model)
    return model if inner is model else unwrapped(inner)


# Every place of a parameter: (module name, module, attribute).
Homes = list[tuple[str, nn.Module, str]]


def route(model: nn.Module, config: LNGDConfig) -> Routing:
    """Assign each parameter of the model, in the order of `model.named_parameters()`.

    Names are those from before torch.compile. Tied parameters have one route, under their first name; a weight that is
    both an embedding and a head is an embedding. Parameters that do not require a gradient are ``frozen``, as are those
    that checkpoints of transformers leave out.

    Raises:
        ValueError: a parameter that cannot be trained here: complex, float16, not initialized, of sparse gradients.
        RuntimeError: one that DeepSpeed has partitioned."""
    around = {plain_name(name): module for name, module in model.named_modules()}
    homes: dict[int, Homes] = {}
    for name, module in around.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append((name, module, attribute))
    vocabularies, lost = vocabulary_layers(model), set(map(id, unsaved_parameters(model)))
    routing, layer_of, biases = Routing([], [], [], {}, {}), dict[nn.Module, Layer](), list[tuple[int, nn.Module]]()
    for compiled_name, parameter in model.named_parameters():
        name = plain_name(compiled_name)
        # peft's MultiheadAttention makes its frozen weights anew whenever its modules are listed
        module_name, _, attribute = name.rpartition(".")
        modules = homes.setdefault(id(parameter), [(module_name, around[module_name], attribute)])
        routing.parameters[name], routing.homes[name] = parameter, modules[0][1:]
        _check(name, parameter, modules)
        owner, reason, decays = _decide(name, parameter, modules, config, around, vocabularies)
        if owner != FROZEN_OWNER and id(parameter) in lost:
            owner, reason, decays = FROZEN_OWNER, UNSAVED, False
        if reason == EXACT_EMBEDDING:
            routing.embeddings.append((name, [m for _, m, _ in modules if isinstance(m, nn.Embedding)]))
        elif owner == LNGD_OWNER:
            layer = _layer(name, parameter, modules, around)
            routing.layers.append(layer)
            layer_of |= {module: layer for _, module, _ in modules}
            reason += f", {layer.heads} heads" if layer.heads > 1 and config.direction == "polar" else ""
        elif reason == "bias" and config.bias == "factor" and len(modules) == 1:
            biases.append((len(routing.routes), modules[0][1]))
        shape = tuple(parameter.shape)
        routing.routes.append(Route(name, owner, modules[0][0], reason, shape, parameter.numel(), decays))
    for number, module in biases:  # which may come before their weights
        known, own = layer_of.get(module), routing.routes[number]
        if known is not None and len(known.modules) == 1:  # a weight that several share has no one bias
            known.bias_name, known.bias = own.parameter, routing.parameters[own.parameter]
            routing.routes[number] = replace(own, owner=LNGD_OWNER, reason="bias in the factor")
    return routing


def _check(name: str, parameter: nn.Parameter, modules: Homes) -> None:
    if hasattr(parameter, "ds_id"):
        raise RuntimeError(
            f"LNGD: parameter '{name}' is one that DeepSpeed (ZeRO-3) has split, accepted: whole parameters (DDP), "
            "or those of FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if is_lazy(parameter):
        raise ValueError(f"{name}: got a parameter without a shape yet, accepted: a model that was called once")
    if parameter.requires_grad:
        if parameter.is_complex():
            raise ValueError(f"{name}: got {parameter.dtype}, accepted: real numbers (or requires_grad=False)")
        if any(getattr(module, "sparse", False) is True for _, module, _ in modules):
            raise ValueError(f"{name}: got an embedding with sparse=True, accepted: sparse=False")
        check_precision(name, parameter)


def check_precision(name: str, weight: torch.Tensor) -> None:
    """Raise ValueError for a weight of float16, by name."""
    if weight.dtype == torch.float16:
        raise ValueError(
            f"{name}: got a weight of torch.float16, whose updates are lost below 6e-8, accepted: torch.float32 (under "
            "torch.autocast and with a GradScaler for fp16) or torch.bfloat16"
        )


def unsaved_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Sinusoidal positions, and what else a model of transformers leaves out of its checkpoints.

    `from_pretrained` makes them parameters that want a gradient (transformers 5.23, 5.24): what an optimizer made of
    them would be lost with every save."""
    for module in model.modules():
        if "sinusoidal" in type(module).__name__.lower():
            yield from module.parameters()
        left_out = getattr(module, "_keys_to_ignore_on_save", None) or ()
        yield from (parameter for name, parameter in module.named_parameters() if name in left_out)


def vocabulary_layers(model: nn.Module) -> set[nn.Module]:
    """The output layers over a vocabulary, which AdamW takes: those that transformers' models name, and linear layers
    of such a shape. In LNGD they cost the most and end higher (`benchmarks.studies.output_layers`)."""
    found = set()
    for module in model.modules():
        tell = getattr(module, "get_output_embeddings", None)
        if callable(tell) and isinstance(layer := tell(), nn.Module):
            found.add(layer)
        if isinstance(module, nn.Linear):
            outputs, inputs = module.out_features, module.in_features
            found |= {module} if outputs >= max(VOCABULARY, VOCABULARY_RATIO * inputs) else set()
    return found


def _decide(
    name: str, parameter: nn.Parameter, modules: Homes, config: LNGDConfig, around: Mapping[str, nn.Module],
    vocabularies: Collection[nn.Module],
) -> tuple[str, str, bool]:  # fmt: skip
    """(owner, reason, weight decay); a bias is taken for one outside its layer's factor."""
    if not parameter.requires_grad:
        return FROZEN_OWNER, "frozen", False
    module_name, module, attribute = modules[0]
    plain = parameter.dim() < 2
    if any("norm" in type(m).__name__.lower() for _, m, _ in modules):
        return FALLBACK_OWNER, "norm", False
    if config.exclude and re.search(config.exclude, name):
        return FALLBACK_OWNER, "excluded", not plain
    adapter = adapter_reason(module_name, around, geometry_of(module))
    if adapter is not None:
        vector = parameter.numel() == max(parameter.shape, default=1)  # a scale, kept as [1, d] by some
        return FALLBACK_OWNER, adapter, not vector
    if any(isinstance(m, nn.Embedding) for _, m, _ in modules):
        names = [f"{type(m).__name__}.{n}".lower() for n, m, _ in modules]
        position = any("position" in name or "relative" in name for name in names)  # T5's relative_attention_bias
        if position or config.embedding == "fallback":
            return FALLBACK_OWNER, "position" if position else "embedding", True
        return LNGD_OWNER, EXACT_EMBEDDING, True
    if attribute == "weight" and any(m in vocabularies for _, m, _ in modules):
        return FALLBACK_OWNER, "output layer over a vocabulary", True
    geometries = {None if _inside_attention(m) else geometry_of(m) for _, m, _ in modules}
    geometry = geometries.pop() if len(geometries) == 1 else None
    if geometry is not None and attribute == "weight":
        return LNGD_OWNER, _kind(geometry), True
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


def _layer(name: str, weight: nn.Parameter, modules: Homes, around: Mapping[str, nn.Module]) -> Layer:
    """The layer of a weight, without a bias."""
    module_name, module, _ = modules[0]
    geometry = geometry_of(module)
    assert geometry is not None
    heads = heads_of(module_name, geometry.out_features, around) if geometry.window is None else 1
    return Layer(module_name, geometry, name, weight, modules=[(n, m) for n, m, _ in modules], heads=heads)


# PEFT's adapters. LoRA's A and B are linear layers, called like any other, and need nothing of this. Told by the
# modules around a parameter, so peft itself is not imported.

_TUNERS = "peft.tuners."
# Modules around LoRA's A and B that multiply both into the weight, so that their forward is never called.
_MERGING = ("MultiheadAttention", "ParamWrapper")
# Tuners whose linear layers are called; those of others may be read only.
_CALLING = ("prefix_tuning", "p_tuning")


def adapter_reason(name: str, modules: Mapping[str, nn.Module], geometry: object) -> str | None:
    """Why AdamW takes the parameters of an adapter's module of this name (``…q_proj.lora_A.default``); None: it is no
    adapter's, or a layer like any other. `modules`: all of the model's; `geometry`: None where it is no layer that LNGD
    can take."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):  # innermost first
        if parts[end : end + 1] == ["base_layer"]:  # what the adapter stands beside
            return None
        module = modules[".".join(parts[:end])]
        path = type(module).__module__
        if not path.startswith(_TUNERS) or any(cls.__name__ == "BaseTuner" for cls in type(module).__mro__):
            continue
        tuner = path.removeprefix(_TUNERS).split(".")[0]
        if tuner != "lora":
            return None if geometry is not None and tuner in _CALLING else f"adapter, {tuner}"
        outer = (type(modules[".".join(parts[:i])]).__name__ for i in range(end, -1, -1))
        merging = next((found for found in outer if found in _MERGING), None)
        return _reason_of_lora(module, parts[-1], geometry, merging)
    return None


def _reason_of_lora(module: nn.Module, adapter: str, geometry: object, merging: str | None) -> str | None:
    """`module`: peft's, that holds A and B of an `adapter`, or what DoRA adds to it; `merging`: what merges them."""
    kind, variant = type(module).__name__, getattr(module, "lora_variant", {}).get(adapter)
    form = kind if variant is None else type(variant).__name__.removesuffix("Variant")
    if form.startswith("Dora"):  # calls A and B on an identity matrix, too, and scales what they give by their norm
        return "adapter, DoRA"
    if variant is not None:
        return f"adapter, LoRA variant {form}"
    if geometry is None:
        return f"adapter, LoRA of {kind}"
    return None if merging is None else f"adapter, LoRA merged by {merging}"


def format_routes(routes: list[Route]) -> str:
    """The routing as a table, one line a kind of owner and reason (after the first step also what was found to follow
    LNGD's layers), shares of all parameters, names abbreviated."""
    total = sum(r.numel for r in routes) or 1
    kinds: dict[tuple[str, str], list[Route]] = {}
    for r in routes:
        followed = r.decays and r.follows not in ("", "identity")  # told of a layer once: with its weight
        reason = f"{r.reason}, followed by {r.follows}" if followed else r.reason
        kinds.setdefault((r.owner, reason), []).append(r)
    rows = [("owner", "reason", "tensors", "parameters", "share", "for example")]
    for (owner, reason), own in sorted(kinds.items(), key=lambda item: (item[0][0] != LNGD_OWNER, item[0])):
        count = sum(r.numel for r in own)
        rows += [(owner, reason, str(len(own)), f"{count:,}", f"{100 * count / total:.1f} %", own[0].parameter)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in (2, 3, 4) else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_rates(groups: Iterable[Mapping[str, Any]]) -> str:
    """What a rate `lr` means in each parameter group, and the weight decays."""
    said = []
    for group in groups:
        floor = f" (none below {group['decay_floor']:g} of the first norm)" if group["decay_floor"] else ""
        decay = f"weight decay {group['weight_decay']:g}{floor}" if group["weight_decay"] else "no weight decay"
        said.append(f"{group['name']} {group['lr_scale']:g} × lr, {decay}")
    return f"Rates: {'; '.join(said)}."
