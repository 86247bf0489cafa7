"""`Core` ↔ plain dicts of tensors, numbers and strings; every check of a state that is loaded. A state dict is torch's,
with one key more: ``lngd`` says which version wrote it, for which options and parameters, and who shares a factor with
whom. `torch.distributed.checkpoint` drops that key: then the topology is found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import LNGDConfig
from .core import Built, Core, Entry
from .norms import NORMS
from .topology import Topology
from .torch_internals import is_sharded, local

VERSION = 9
_KINDS: dict[str, type] = {"config": dict, "parameters": dict, "topology": list, "steps": int}
# Options that a run may go on with otherwise than it began; `preset` only says where the others come from.
MAY_CHANGE = (
    "preset",
    "rate_scale",
    "factor_interval",
    "inverse_interval",
    "update_interval",
    "weight_decay",
    "fallback_lr_scale",
)

ByParameter = dict[nn.Parameter, dict[str, Any]]


def save(core: Core) -> ByParameter:
    """Parameter → name → tensor, as a checkpoint has them: the live ones, and under layouts with owners what others
    keep (*owned*: whole; *rows*: as DTensors). A collective under these."""
    if not core.layout.has_owners:
        return core.states  # type: ignore[return-value]
    found = {parameter: dict(state) for parameter, state in core.states.items()}
    shared: dict[tuple[str, str], Any] = {}
    for entry in core.built.entries:
        if entry.group is None:
            continue
        key = (entry.group, entry.key)
        if not entry.shared or key not in shared:
            shared[key] = core.layout.export(entry.value, entry.group, entry.shape, entry.like)
        own = {"step": core.count, "turns": core.turns, entry.key: shared[key]}
        found.setdefault(entry.parameter, {}).update(own)
    return found


def describe(core: Core) -> dict[str, Any]:
    """What stands under the key ``lngd``."""
    return {
        "version": VERSION,
        "config": core.config.to_dict(),
        "parameters": parameters_of(core),
        "topology": core.built.topology.state() if core.batches else [],
        "steps": core.steps,
    }


def parameters_of(core: Core) -> dict[str, list[int]]:
    """Shapes of the parameters that are trained, by name."""
    return {r.parameter: list(r.shape) for r in core.routing.routes if r.kind is not None}


def check_origin(config: LNGDConfig, found: Any) -> Mapping[str, Any]:
    """What stands under ``lngd``, if LNGD wrote it, in this version, with these options (but for `MAY_CHANGE`); else
    raise ValueError."""
    if not isinstance(found, Mapping) or "version" not in found:
        raise ValueError("state_dict: got the state of another optimizer, accepted: one that LNGD wrote (key 'lngd')")
    if found["version"] != VERSION:
        raise ValueError(f"state_dict: got version {found['version']}, accepted: {VERSION}")
    for name, kind in _KINDS.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"state_dict: {name}: got {found.get(name, 'none')!r}, accepted: a {kind.__name__}")
    if found["steps"] < 0:
        raise ValueError(f"state_dict: steps: got {found['steps']!r}, accepted: an integer, at least 0")
    here, there = config.to_dict(), found["config"]
    differing = [name for name in here if name not in MAY_CHANGE and there.get(name) != here[name]]
    if differing:
        what = "; ".join(f"{name}: checkpoint {there.get(name)!r}, here {here[name]!r}" for name in differing)
        raise ValueError(f"state_dict: the config differs: {what} (only {', '.join(MAY_CHANGE[1:])} may change)")
    return found


def check_parameters(here: Mapping[str, list[int]], found: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state's ``parameters`` are these; names those that differ."""
    there = {name: list(shape) for name, shape in found["parameters"].items()}
    pairs = {name: (there.get(name, "none"), here.get(name, "none")) for name in {**here, **there}}
    differing = [f"{name}: checkpoint {a}, here {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"state_dict: the model differs: {'; '.join(differing[:5])}{more}")


def _checked(name: str, found: Any, shape: torch.Size) -> Tensor:
    """A tensor of finite numbers in this shape; else raise ValueError: a damaged state must not be loaded by half."""
    if not isinstance(found, Tensor) or found.shape != shape:
        what = list(found.shape) if isinstance(found, Tensor) else "none"
        raise ValueError(f"state_dict: {name}: got {what}, accepted: a tensor {list(shape)}")
    if not found.is_floating_point():  # those that are, of another precision, are converted
        raise ValueError(f"state_dict: {name}: got {found.dtype}, accepted: floating point")
    may_be_nan = name.endswith("condition")  # which EKFAC's bank cannot know
    if not may_be_nan and not bool(torch.isfinite(local(found)).all()):
        raise ValueError(f"state_dict: {name}: got NaN or infinity, accepted: finite numbers")
    return found


def _others(core: Core, states: ByParameter) -> ByParameter:
    """What is kept of parameters in no layer, what bfloat16 weights lack, and norms: checked, a copy on the parameter's
    device, sharded as that is."""
    names, found = {parameter: name for name, parameter in core.routing.parameters.items()}, ByParameter()
    for parameter, state in states.items():
        name = names.get(parameter, f"an added parameter {list(parameter.shape)}")
        shapes = {"lost": parameter.shape, **dict.fromkeys(NORMS, torch.Size())}
        shapes = {key: shape for key, shape in shapes.items() if key in state}
        if parameter not in core.in_layers and set(state) - set(shapes):
            shapes |= {key: like.shape for key, like in core.new_state(parameter).items()}
        own = found[parameter] = {}
        for key, shape in shapes.items():
            value = _checked(f"{name}.{key}", state.get(key), shape)
            sharded = is_sharded(parameter) and shape == parameter.shape
            device = "cpu" if key in NORMS else parameter.device
            value = _share(core, value.detach(), sharded).to(device, copy=True)
            own[key] = core.layout.as_sharded(value, shape) if sharded else value
    return found


def load(core: Core, states: ByParameter, described: Mapping[str, Any] | None) -> None:
    """Take over a state; a collective under layouts with owners. Nothing is changed if it does not fit.

    Args:
        states: parameter → name → tensor, of what :func:`save` gives on any layout.
        described: what stands under ``lngd``, checked; None: it is not known.

    Raises:
        ValueError: a tensor is missing, has another shape, or is not finite; names it."""
    before, turns = (core.built, core.layout.owners), core.turns.clone()
    known = [layer.name for layer in core.routing.layers]
    try:
        topology = Topology.from_state(described["topology"]) if described and described["topology"] else None
        has_layers = any(_everywhere(core, any("momentum" in states.get(p, ()) for p in core.in_layers)))
        if known and described is None and not has_layers:
            raise ValueError("state_dict: got the state of another optimizer, accepted: one that LNGD wrote")
        others = _others(core, states)
        core.built = Built()
        core.set_turns(max(_everywhere(core, _turns_in(states)), key=lambda turns: float(turns[2])))
        if has_layers:
            whole = topology or Topology.unshared(known)
            if unknown := sorted(set(whole.of_layer) ^ set(known)):
                raise ValueError(f"state_dict: the layers differ: {', '.join(unknown[:5])}")
            core.build(whole)
            for entry in core.built.entries:
                if entry.value is not None or core.layout.shards_rows:
                    value = states.get(entry.parameter, {}).get(entry.key)
                    _copy(core, entry, _checked(f"{entry.layer}.{entry.key}", value, entry.shape))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        core.built, core.layout.owners = before
        core.set_turns(turns)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"state_dict: got a damaged state ({type(error).__name__}: {error})") from error
    core.capture.topology = topology or Topology()  # to be found
    core.states.clear()
    for parameter, state in others.items():
        core.states[parameter].update(state)
    steps = [state["step"] for state in states.values() if "step" in state]
    core.count.fill_(float(described["steps"] if described else max(steps, default=0)))
    core.started = any(_everywhere(core, any(bool((bank.weight > 0).any()) for bank in core.banks)))
    core.bind()


def _everywhere(core: Core, own: Any) -> list[Any]:
    """The values of all processes that have a share of the state."""
    return core.layout.everyone.all_gather_value(own) if core.layout.has_owners else [own]


def _turns_in(states: ByParameter) -> Tensor:
    """`Core.turns` of a state; zeros where it has none."""
    found = next((state["turns"] for state in states.values() if "turns" in state), torch.zeros(3))
    found = _checked("turns", found, torch.Size([3]))
    if bool((found < 0).any()):
        raise ValueError(f"state_dict: turns: got {found.tolist()}, accepted: numbers, at least 0")
    return found


def rebuild(core: Core, topology: Topology) -> None:
    """Banks and batches for another topology, or for layers that were moved, with the state of those before. A
    collective under layouts with owners."""
    carried = save(core) if core.batches else {}
    core.build(topology)
    for entry in core.built.entries:
        value = carried.get(entry.parameter, {}).get(entry.key)
        if value is not None:
            _copy(core, entry, value)
    core.bind()


def clear(core: Core) -> None:
    """Start anew, as before the first step; who shares an input is the model's, and stays known."""
    core.built = Built()
    core.started = False
    core.count.zero_()
    core.set_turns(torch.zeros(3))


def _share(core: Core, value: Any, sharded: bool) -> Tensor:
    """What belongs to this process of a tensor that is whole or sharded: its rows of what is `sharded` here, or all."""
    if is_sharded(value):
        return local(value) if sharded else value.full_tensor()
    return value[core.layout.rows(len(value))] if sharded else value


def _copy(core: Core, entry: Entry, value: Tensor) -> None:
    share = _share(core, value, entry.group is None and core.layout.shards_rows)
    if entry.value is not None:
        local(entry.value).copy_(share)


def memory_usage(core: Core) -> dict[str, int]:
    """Bytes of this process by kind, as `LNGD.memory_usage` promises."""
    usage = {"momentum": 0, "factors": 0, "inverses": 0, "embeddings": 0, "fallback": 0, "rounding": 0}
    usage["momentum"] = sum(map(_bytes, core.built.momentum.values()))
    tensors = [batch.state for batch in core.batches] + [bank.tensors() for bank in core.banks]
    for key, tensor in (item for own in tensors for item in own.items()):
        derived = key.startswith(("whitener", "psi_whitener", "inverse", "basis"))
        usage["inverses" if derived else "factors"] += _bytes(tensor)
    for parameter, state in core.states.items():
        kind = "embeddings" if parameter in core.tables else "fallback"
        for key, tensor in state.items():
            if key == "lost" or parameter not in core.in_layers:
                usage["rounding" if key == "lost" else kind] += _bytes(tensor)
    usage["total"] = sum(usage.values())
    return usage


def _bytes(tensor: Any) -> int:
    here = local(tensor)
    return here.numel() * here.element_size()
