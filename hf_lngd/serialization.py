"""LNGD's state as plain dicts of tensors, numbers and strings, keyed by module name; checked, then copied back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .curvature.fisher import generators_of
from .curvature.topology import Topology
from .preconditioner import Preconditioner

if TYPE_CHECKING:
    from .optimizer import LNGD

VERSION = 4
# Fields that change no result.
_FREE = ("conv_memory", "placement")


def state_of(optimizer: LNGD) -> dict[str, Any]:
    """The state under the key ``lngd``. Tensors are the optimizer's own (views of its banks), not copies."""
    made = optimizer._preconditioner
    return {
        "version": VERSION,
        "config": optimizer.config.to_dict(),
        "parameters": {r.parameter: list(r.shape) for r in optimizer.routing() if r.owner != "frozen"},
        "steps": optimizer._steps,
        "topology": [] if made is None else optimizer._capture.topology.state(),
        "groups": {} if made is None else _group_states(made),
        "layers": {} if made is None else _layer_states(made),
        "flags": {} if made is None else _flags(made),
        "fallback": _fallback_states(optimizer),
        "embeddings": {e.name: e.state() for e in optimizer._embeddings},
        "random": optimizer._capture.source.state(),
    }


def check(optimizer: LNGD, state: Any) -> Mapping[str, Any]:
    """The state, if it fits this optimizer.

    Raises:
        ValueError: says what differs; config fields and parameters with both values.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise ValueError("state_dict: got the state of another optimizer, accepted: one that LNGD wrote (key 'lngd')")
    if state["version"] != VERSION:
        raise ValueError(f"state_dict: got version {state['version']}, accepted: {VERSION}")
    missing = sorted(set(state_of(optimizer)) - set(state))
    if missing:
        raise ValueError(f"state_dict: got a state without {', '.join(missing)}, accepted: a whole one")
    here, there = optimizer.config.to_dict(), dict(state["config"])
    differing = [name for name in here if there.get(name) != here[name] and name not in _FREE]
    if differing:
        what = "; ".join(f"{name}: checkpoint {there.get(name)!r}, here {here[name]!r}" for name in differing)
        raise ValueError(f"state_dict: the config differs: {what}")
    _check_parameters(optimizer, state)
    try:
        _check_banks(optimizer, state)
        _check_rest(optimizer, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"state_dict: got a damaged state ({type(error).__name__}: {error})") from error
    return state


def _check_parameters(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    here = {r.parameter: list(r.shape) for r in optimizer.routing() if r.owner != "frozen"}
    there = {name: list(shape) for name, shape in state["parameters"].items()}
    if here == there:
        return
    differing = [
        f"{name}: checkpoint {there.get(name, 'none')}, here {here.get(name, 'none')}"
        for name in [*here, *(n for n in there if n not in here)]
        if here.get(name) != there.get(name)
    ]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ValueError(f"state_dict: the model differs: {'; '.join(differing[:5])}{more}")


def _check_banks(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    """Every tensor is there and has its shape: a damaged checkpoint must not be loaded by half."""
    if state["topology"]:
        made = _preconditioner_of(optimizer, state)
        _check_tensors("groups", _group_states(made), state)
        _check_tensors("layers", _layer_states(made), state)
        _check_flags(_flags(made), state["flags"])
    named = _fallback_names(optimizer)
    strange = sorted(set(state["fallback"]) - set(named))
    if strange:
        raise ValueError(f"state_dict: fallback: got {', '.join(strange[:5])}, accepted: names of parameters here")
    _check_tensors("fallback", {n: optimizer._fallback.new_moments(named[n]) for n in state["fallback"]}, state)
    for embedding in optimizer._embeddings:
        if embedding.name not in state["embeddings"]:
            raise ValueError(f"state_dict: embeddings: got none of {embedding.name}, accepted: all of them")
        if state["embeddings"][embedding.name]:
            _check_tensors("embeddings", {embedding.name: embedding.new_state()}, state)


def _check_flags(expected: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> None:
    for name, values in expected.items():
        if name not in found or len(found[name]) != len(values):
            what = len(found[name]) if name in found else "none"
            raise ValueError(f"state_dict: flags.{name}: got {what}, accepted: {len(values)} values")


def _check_rest(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    if not isinstance(state["steps"], int):
        raise ValueError(f"state_dict: steps: got {state['steps']!r}, accepted: an integer")
    generators_of(state["random"])


def _check_tensors(kind: str, expected: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            found = state[kind].get(name, {}).get(key)
            if not isinstance(found, Tensor) or found.shape != tensor.shape:
                what = list(found.shape) if isinstance(found, Tensor) else "none"
                raise ValueError(
                    f"state_dict: {kind}.{name}.{key}: got {what}, accepted: a tensor {list(tensor.shape)}"
                )


def _preconditioner_of(optimizer: LNGD, state: Mapping[str, Any]) -> Preconditioner:
    topology = Topology.from_state(state["topology"])
    unknown = sorted(set(topology.of_layer) ^ set(optimizer._capture.layers))
    if unknown:
        raise ValueError(f"state_dict: the layers differ: {', '.join(unknown[:5])}")
    return optimizer._new_preconditioner(topology)


def load(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    """Copy a state that :func:`check` has passed into the optimizer."""
    optimizer._steps = int(state["steps"])
    optimizer._fallback.moments.clear()
    named = _fallback_names(optimizer)
    for name, moments in state["fallback"].items():
        parameter = named[name]
        optimizer._fallback.moments[parameter] = {
            key: value.detach().clone().to(parameter.device) for key, value in moments.items()
        }
    for embedding in optimizer._embeddings:
        embedding.load_state(state["embeddings"][embedding.name])
    optimizer._capture.source.load_state(state["random"])
    if not state["topology"]:
        optimizer._preconditioner, optimizer._capture.topology = None, Topology()
        return
    made = _preconditioner_of(optimizer, state)
    for kind, states in (("groups", _group_states(made)), ("layers", _layer_states(made))):
        for name, tensors in states.items():
            for key, tensor in tensors.items():
                tensor.copy_(state[kind][name][key])
    _set_flags(made, state["flags"])
    optimizer._preconditioner = made
    optimizer._capture.topology = Topology.from_state(state["topology"])


def _group_states(made: Preconditioner) -> dict[str, dict[str, Tensor]]:
    return {
        spec.name: {key: tensor[rows.start : rows.stop] for key, tensor in bank.tensors().items()}
        for bank in made.factor_banks
        for spec, rows in zip(bank.specs, bank.rows.values(), strict=True)
    }


def _layer_states(made: Preconditioner) -> dict[str, dict[str, Tensor]]:
    return {
        layer.name: {key: tensor.unflatten(0, (len(bank.layers), -1))[i] for key, tensor in bank.tensors().items()}
        for bank in made.layer_banks
        for i, layer in enumerate(bank.layers)
    }


def _flags(made: Preconditioner) -> dict[str, list[Any]]:
    return {
        "inverted": [bank.inverted for bank in made.factor_banks],
        "started": [bank.started for bank in made.layer_banks],
        "failed_factors": [bank.failures.clone() for bank in made.factor_banks],
        "skipped_factors": [bank.skipped.clone() for bank in made.factor_banks],
        "failed_layers": [bank.failures.clone() for bank in made.layer_banks],
    }


def _set_flags(made: Preconditioner, flags: Mapping[str, list[Any]]) -> None:
    for i, bank in enumerate(made.factor_banks):
        bank.inverted = bool(flags["inverted"][i])
        bank.failures.copy_(flags["failed_factors"][i])
        bank.skipped.copy_(flags["skipped_factors"][i])
    for i, layer_bank in enumerate(made.layer_banks):
        layer_bank.started = bool(flags["started"][i])
        layer_bank.failures.copy_(flags["failed_layers"][i])


def _fallback_names(optimizer: LNGD) -> dict[str, nn.Parameter]:
    """The model's parameters by name, and those added later by group and place."""
    named = dict(optimizer._parameters)
    known = set(named.values())
    for number, group in enumerate(optimizer.param_groups):
        named.update({f"param_groups.{number}.{i}": p for i, p in enumerate(group["params"]) if p not in known})
    return named


def _fallback_states(optimizer: LNGD) -> dict[str, dict[str, Tensor]]:
    names = {parameter: name for name, parameter in _fallback_names(optimizer).items()}
    return {names[p]: dict(m) for p, m in optimizer._fallback.moments.items() if p in names}


def memory_usage(optimizer: LNGD) -> dict[str, int]:
    """Bytes of state by kind, as `LNGD.memory_usage` promises."""
    usage = {"momentum": 0, "factors": 0, "inverses": 0, "embeddings": 0, "fallback": 0}
    inverses = ("inverse", "root", "whitener", "polar", "inverse_left", "inverse_right", "basis_left", "basis_right")
    kind_of = {"momentum": "momentum"} | dict.fromkeys(inverses, "inverses")
    made = optimizer._preconditioner
    if made is not None:
        for states in (_group_states(made), _layer_states(made)):
            for tensors in states.values():
                for key, tensor in tensors.items():
                    usage[kind_of.get(key, "factors")] += _bytes(tensor)
    for embedding in optimizer._embeddings:
        usage["embeddings"] += sum(_bytes(t) for t in embedding.state().values())
    usage["fallback"] = sum(_bytes(t) for m in optimizer._fallback.moments.values() for t in m.values())
    usage["total"] = sum(usage.values())
    return usage


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
