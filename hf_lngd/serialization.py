"""LNGD's state as plain dicts of tensors, numbers and strings, keyed by module name; checked, then copied back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import LNGDConfig
from .curvature.fisher import generators_of
from .curvature.topology import Topology
from .fallback import ROW_WISE
from .gathering import LOST, OTHERS, gather_state
from .preconditioner import Preconditioner

if TYPE_CHECKING:
    from .optimizer import LNGD

VERSION = 5
# Fields that may differ: those that change no result, and the one in whose precision factors are taken over.
_FREE = ("conv_memory", "placement", "factor_dtype")
_KINDS = {"steps": int, "topology": list} | dict.fromkeys(
    ("config", "parameters", "groups", "layers", "flags", "fallback", "embeddings", "random", "rounding"), dict
)
# Newton's iteration leaves it NaN.
_MAY_BE_NAN = ("condition",)


def state_of(optimizer: LNGD) -> dict[str, Any]:
    """The state under the key ``lngd``. Tensors are the optimizer's own (views of its banks), not copies.

    Where parameters are sharded, this is a collective: rank 0 gets the whole state, copied to the CPU, and others
    `OTHERS`.
    """
    own = share_of(optimizer)
    return own if optimizer._shards is None else gather_state(optimizer, own, fallback_names(optimizer))


def share_of(optimizer: LNGD) -> dict[str, Any]:
    """What of the state is on this rank."""
    made = optimizer._preconditioner
    return {
        "version": VERSION,
        "config": optimizer.config.to_dict(),
        "parameters": parameters_of(optimizer),
        "steps": optimizer._steps,
        "topology": [] if made is None else optimizer._capture.topology.state(),
        **bank_states(made),
        "flags": {} if made is None else flags_of(made),
        "fallback": _fallback_states(optimizer),
        "embeddings": {e.name: e.state() for e in optimizer._embeddings},
        "random": optimizer._capture.source.state(),
        "rounding": _rounding_states(optimizer),
    }


def check_origin(config: LNGDConfig, state: Any, parts: Iterable[str] = _KINDS) -> Mapping[str, Any]:
    """The state, if LNGD wrote it, in this version, under these settings, with these parts; else raise ValueError."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise ValueError("state_dict: got the state of another optimizer, accepted: one that LNGD wrote (key 'lngd')")
    if state["version"] != VERSION:
        raise ValueError(f"state_dict: got version {state['version']}, accepted: {VERSION}")
    missing = sorted(set(parts) - set(state))
    if missing:
        raise ValueError(f"state_dict: got a state without {', '.join(missing)}, accepted: a whole one")
    for name in parts:
        if not isinstance(state[name], _KINDS[name]):
            raise ValueError(f"state_dict: {name}: got {state[name]!r}, accepted: a {_KINDS[name].__name__}")
    here, there = config.to_dict(), state["config"]
    differing = [name for name in here if there.get(name) != here[name] and name not in _FREE]
    if differing:
        what = "; ".join(f"{name}: checkpoint {there.get(name)!r}, here {here[name]!r}" for name in differing)
        raise ValueError(f"state_dict: the config differs: {what}")
    return state


def check(optimizer: LNGD, state: Any) -> Mapping[str, Any]:
    """The state, if it fits this optimizer.

    Raises:
        ValueError: says what differs; config fields and parameters with both values.
    """
    if state == OTHERS:
        raise ValueError("state_dict: got what a rank other than 0 has under FSDP2, accepted: rank 0's, which is whole")
    check_origin(optimizer.config, state)
    try:
        check_parameters(parameters_of(optimizer), state)
        _check_banks(optimizer, state)
        _check_rest(optimizer, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"state_dict: got a damaged state ({type(error).__name__}: {error})") from error
    return state


def check_plain(optimizer: LNGD, state: Any) -> None:
    """As :func:`check`, of what tells whose state it is: nothing else is looked at."""
    check_origin(optimizer.config, state, ("config", "parameters"))
    check_parameters(parameters_of(optimizer), state)


def parameters_of(optimizer: LNGD) -> dict[str, list[int]]:
    """Shapes of the parameters that it trains, by name."""
    return {r.parameter: list(r.shape) for r in optimizer.routing() if r.owner != "frozen"}


def check_parameters(here: Mapping[str, list[int]], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state's ``parameters`` are these; names those that differ."""
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
    made = preconditioner_of(optimizer, state)
    for kind, expected in shapes_of(optimizer, state, made).items():
        _check_tensors(kind, expected, state)
    if made is not None:
        _check_flags(flags_of(made), state["flags"])


def shapes_of(
    optimizer: LNGD, state: Mapping[str, Any], made: Preconditioner | None
) -> dict[str, dict[str, dict[str, torch.Size]]]:
    """What a whole state with these names in `fallback`, `rounding` and `embeddings` has: kind → name → key → shape.

    Args:
        made: the banks of the state's topology.

    Raises:
        ValueError: names that this optimizer does not know.
    """
    shapes = _bank_shapes(made)
    named = fallback_names(optimizer)
    for kind in ("fallback", "rounding"):
        strange = sorted(set(state[kind]) - set(named))
        if strange:
            raise ValueError(f"state_dict: {kind}: got {', '.join(strange[:5])}, accepted: names of parameters here")
    shapes["fallback"] = {
        name: {key: t.shape if key not in ROW_WISE else named[name].shape for key, t in moments.items()}
        for name, moments in ((n, optimizer._fallback.new_moments(named[n])) for n in state["fallback"])
    }
    shapes["rounding"] = {name: {LOST: named[name].shape} for name in state["rounding"]}
    shapes["embeddings"] = {}
    for embedding in optimizer._embeddings:
        if embedding.name not in state["embeddings"]:
            raise ValueError(f"state_dict: embeddings: got none of {embedding.name}, accepted: all of them")
        if state["embeddings"][embedding.name]:
            shapes["embeddings"][embedding.name] = {
                key: embedding.table.shape if key in embedding.row_wise else t.shape
                for key, t in embedding.new_state().items()
            }
    return shapes


def _check_flags(expected: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> None:
    for name, values in expected.items():
        if name not in found or len(found[name]) != len(values):
            what = len(found[name]) if name in found else "none"
            raise ValueError(f"state_dict: flags.{name}: got {what}, accepted: {len(values)} values")


def _check_rest(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    if isinstance(state["steps"], bool) or state["steps"] < 0:
        raise ValueError(f"state_dict: steps: got {state['steps']!r}, accepted: an integer, at least 0")
    generators_of(state["random"])


def _check_tensors(kind: str, expected: Mapping[str, Mapping[str, torch.Size]], state: Mapping[str, Any]) -> None:
    for name, shapes in expected.items():
        for key, shape in shapes.items():
            found = state[kind].get(name, {}).get(key)
            if not isinstance(found, Tensor) or found.shape != shape:
                what = list(found.shape) if isinstance(found, Tensor) else "none"
                raise ValueError(f"state_dict: {kind}.{name}.{key}: got {what}, accepted: a tensor {list(shape)}")
            if not found.is_floating_point():  # those that are, of another precision, are converted
                raise ValueError(f"state_dict: {kind}.{name}.{key}: got {found.dtype}, accepted: floating point")
            if key not in _MAY_BE_NAN and not bool(torch.isfinite(found).all()):
                raise ValueError(f"state_dict: {kind}.{name}.{key}: got NaN or infinity, accepted: finite numbers")


def preconditioner_of(optimizer: LNGD, state: Mapping[str, Any]) -> Preconditioner | None:
    """New banks for the topology of a state, None before the first step. ValueError: its layers are not the model's."""
    if not state["topology"]:
        return None
    topology = Topology.from_state(state["topology"])
    unknown = sorted(set(topology.of_layer) ^ set(optimizer._capture.layers))
    if unknown:
        raise ValueError(f"state_dict: the layers differ: {', '.join(unknown[:5])}")
    return optimizer._new_preconditioner(topology)


def load(optimizer: LNGD, state: Mapping[str, Any]) -> None:
    """Copy a whole state that :func:`check` has passed, or the own one, into banks made for the model as it is now."""
    made, stale = preconditioner_of(optimizer, state), False
    for kind, states in bank_states(made).items():
        for name, tensors in states.items():
            for key, tensor in tensors.items():
                if tensor.shape == state[kind][name][key].shape:
                    tensor.copy_(state[kind][name][key])
                else:  # own, of a model that has another dtype since: inverses are kept in another form
                    stale = True
    shards, named = optimizer._shards, fallback_names(optimizer)

    def rows(value: Tensor, row_wise: bool) -> Tensor:
        return value if shards is None or not row_wise else shards.shard(value)

    def by_parameter(kind: str, row_wise: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: rows(t, key in row_wise).detach().clone().to(named[name].device) for key, t in own.items()}
            for name, own in state[kind].items()
        }

    share = {"fallback": by_parameter("fallback", ROW_WISE), "rounding": by_parameter("rounding", (LOST,))}
    share["embeddings"] = {
        e.name: {key: rows(value, key in e.row_wise) for key, value in state["embeddings"][e.name].items()}
        for e in optimizer._embeddings
    }
    attach(optimizer, state, made, share)
    for bank in made.factor_banks if made is not None and stale else ():
        bank.invert(tuple(range(bank.count)))


def attach(
    optimizer: LNGD,
    plain: Mapping[str, Any],
    made: Preconditioner | None,
    share: Mapping[str, Mapping[str, dict[str, Tensor]]],
) -> None:
    """Let the optimizer go on from here.

    Args:
        plain: the rest of the state: ``steps``, ``topology``, ``flags``, ``random``.
        made: banks with this rank's share of the state.
        share: this rank's of ``fallback``, ``rounding`` and ``embeddings``, by name.
    """
    optimizer._steps = int(plain["steps"])
    named = fallback_names(optimizer)
    optimizer._fallback.moments.clear()
    optimizer._fallback.moments.update({named[name]: dict(moments) for name, moments in share["fallback"].items()})
    optimizer._rounding.lost.clear()
    optimizer._rounding.lost.update({named[name]: own[LOST] for name, own in share["rounding"].items()})
    for embedding in optimizer._embeddings:
        embedding.load_state(share["embeddings"][embedding.name])
    optimizer._capture.source.load_state(plain["random"])
    optimizer._preconditioner, optimizer._capture.topology = made, Topology()
    if made is not None:
        counts = optimizer._shards is None or optimizer._shards.ranks.rank == 0  # which sums them over ranks
        _set_flags(made, plain["flags"], counts)
        optimizer._capture.topology = Topology.from_state(plain["topology"])


def bank_states(made: Preconditioner | None) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The tensors of ``groups`` and ``layers`` that this rank keeps: views of the banks."""
    if made is None:
        return {"groups": {}, "layers": {}}
    groups = {
        spec.name: {key: tensor[rows.start : rows.stop] for key, tensor in bank.tensors().items()}
        for bank in made.factor_banks
        for spec, rows in zip(bank.specs, bank.rows.values(), strict=True)
    }
    layers = {
        layer.name: {key: tensor.unflatten(0, (len(bank.layers), -1))[i] for key, tensor in bank.tensors().items()}
        for bank in made.layer_banks
        for i, layer in enumerate(bank.layers)
    }
    return {"groups": groups, "layers": layers}


def _bank_shapes(made: Preconditioner | None) -> dict[str, dict[str, dict[str, torch.Size]]]:
    """Of the state of all ranks' groups and layers."""
    if made is None:
        return {"groups": {}, "layers": {}}
    groups = {
        spec.name: {key: torch.Size((spec.units, *t.shape[1:])) for key, t in bank.tensors().items()}
        for bank, members in zip(made.factor_banks, made.factor_members, strict=True)
        for spec in members
    }
    layers = {
        layer.name: {key: torch.Size((bank.count(key), *t.shape[1:])) for key, t in bank.tensors().items()}
        for bank in made.layer_banks
        for layer in bank.members
    }
    return {"groups": groups, "layers": layers}


def flags_of(made: Preconditioner) -> dict[str, list[Any]]:
    return {
        "inverted": [bank.inverted for bank in made.factor_banks],
        "started": [bank.started for bank in made.layer_banks],
        "failed_factors": [bank.failures.clone() for bank in made.factor_banks],
        "skipped_factors": [bank.skipped.clone() for bank in made.factor_banks],
        "failed_layers": [bank.failures.clone() for bank in made.layer_banks],
    }


def _set_flags(made: Preconditioner, flags: Mapping[str, list[Any]], counts: bool) -> None:
    for i, bank in enumerate(made.factor_banks):
        bank.inverted = bool(flags["inverted"][i])
        bank.failures.fill_(int(flags["failed_factors"][i]) if counts else 0)
        bank.skipped.fill_(int(flags["skipped_factors"][i]) if counts else 0)
    for i, layer_bank in enumerate(made.layer_banks):
        layer_bank.started = bool(flags["started"][i])
        layer_bank.failures.fill_(int(flags["failed_layers"][i]) if counts else 0)


def fallback_names(optimizer: LNGD) -> dict[str, nn.Parameter]:
    """The model's parameters by name, and those added later by group and place."""
    named = dict(optimizer._parameters)
    known = set(named.values())
    for number, group in enumerate(optimizer.param_groups):
        named.update({f"param_groups.{number}.{i}": p for i, p in enumerate(group["params"]) if p not in known})
    return named


def _fallback_states(optimizer: LNGD) -> dict[str, dict[str, Tensor]]:
    names = {parameter: name for name, parameter in fallback_names(optimizer).items()}
    return {names[p]: dict(m) for p, m in optimizer._fallback.moments.items() if p in names}


def _rounding_states(optimizer: LNGD) -> dict[str, dict[str, Tensor]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in fallback_names(optimizer).items()}
    return {names[p]: {LOST: lost} for p, lost in optimizer._rounding.lost.items() if p in names}


def memory_usage(optimizer: LNGD) -> dict[str, int]:
    """Bytes of state by kind, as `LNGD.memory_usage` promises."""
    usage = {"momentum": 0, "factors": 0, "inverses": 0, "embeddings": 0, "fallback": 0, "rounding": 0}
    inverses = ("inverse", "root", "whitener", "polar", "inverse_left", "inverse_right", "basis_left", "basis_right")
    kind_of = {"momentum": "momentum"} | dict.fromkeys(inverses, "inverses")
    for states in bank_states(optimizer._preconditioner).values():
        for tensors in states.values():
            for key, tensor in tensors.items():
                usage[kind_of.get(key, "factors")] += _bytes(tensor)
    for embedding in optimizer._embeddings:
        usage["embeddings"] += sum(_bytes(t) for t in embedding.state().values())
    usage["fallback"] = sum(_bytes(t) for m in optimizer._fallback.moments.values() for t in m.values())
    usage["rounding"] = sum(_bytes(t) for t in optimizer._rounding.lost.values())
    usage["total"] = sum(usage.values())
    return usage


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
