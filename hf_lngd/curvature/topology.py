"""How the layers of a model hang together: who reads the same tensor, and what follows whom.

Found once, by identity (``is``) of live tensors within a forward pass, then kept by module name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .masks import OPEN

# FSDP2 hands each module that it wraps an alias of its input, behind a node of this kind in the graph.
_ALIAS = "RegisterPostBackwardFunctionBackward"


def is_alias(tensor: Any) -> bool:
    """Whether it is what FSDP2 made of a module's input: the same numbers in another object."""
    return type(getattr(tensor, "grad_fn", None)).__name__ == _ALIAS


def same_tensor(first: Tensor | None, second: Tensor) -> bool:
    """Whether both are one tensor; aliases of FSDP2 are the tensor that they were made of."""
    if first is None or first is second:
        return first is not None
    return (is_alias(first) or is_alias(second)) and _edge(first) == _edge(second)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where in the graph a tensor comes from, before FSDP2."""
    node: Any = tensor.grad_fn
    place = tensor.output_nr
    while type(node).__name__ == _ALIAS:
        node, place = node.next_functions[place]
    return node, place


@dataclass
class Group:
    """Layers that share one Φ: they read the same tensor, with the same mask, and nothing that counts follows.

    A layer that something follows, or that is seen under a Fisher which differs a layer, is alone in its group.

    Attributes:
        members: layer names; the first names the group.
        links: what follows the only member, see `chains.Chain`; empty: φ' = 1. one of `HEADS`: a head with the
            model's own predictive distribution.
        stream: which of the batch's masks applies, see `masks.BatchMasks`; `masks.OPEN`: each batch tells.
    """

    members: list[str]
    links: tuple[str, ...] = ()
    stream: str | None = None

    @property
    def name(self) -> str:
        """The first member."""
        return self.members[0]

    def estimates_psi(self, fisher: str) -> bool:
        """Whether g² is anything but one at every position, so that Ψ (Eq. 5) has to be estimated.

        Args:
            fisher: the field of `LNGDConfig`.
        """
        return bool(self.links) or fisher != "expected"


@dataclass
class Topology:
    """The groups of a model, in the order in which they were seen. `frozen` after the first step.

    `unseen`: the layers that no rank had called by then.
    """

    groups: list[Group] = field(default_factory=list)
    frozen: bool = False
    unseen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.of_layer: dict[str, Group] = {name: group for group in self.groups for name in group.members}

    def add(self, layer: str, links: tuple[str, ...], stream: str | None) -> Group:
        """A new group with this layer alone."""
        group = Group([layer], links, stream)
        self.groups.append(group)
        self.of_layer[layer] = group
        return group

    def join(self, layer: str, group: Group) -> None:
        """Let a layer share a group's Φ."""
        group.members.append(layer)
        self.of_layer[layer] = group

    def learn(self, everyone: list[list[dict[str, Any]]]) -> None:
        """Take in the groups that other ranks saw and this one did not call, in an order that is everyone's."""
        order: dict[str, int] = {}
        for state in everyone:
            for group in Topology.from_state(state).groups:
                order.setdefault(group.name, len(order))
                if not any(name in self.of_layer for name in group.members):
                    self.groups.append(group)
                    self.of_layer |= dict.fromkeys(group.members, group)
        self.groups.sort(key=lambda group: order[group.name])

    def freeze(self, layers: list[str]) -> None:
        """End the search: layers that were never called get a group of their own, empty until they are."""
        for name in layers:
            if name not in self.of_layer:
                self.add(name, (), OPEN)
                self.unseen.add(name)
        self.frozen = True

    def state(self) -> list[dict[str, Any]]:
        """Plain lists and strings, for a checkpoint."""
        return [
            {
                "members": list(g.members),
                "links": list(g.links),
                "stream": g.stream or "",
                "unseen": g.name in self.unseen,
            }
            for g in self.groups
        ]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Topology:
        """The inverse of :meth:`state`."""
        groups = [Group(list(g["members"]), tuple(g["links"]), g["stream"] or None) for g in state]
        return cls(groups, frozen=True, unseen={g["members"][0] for g in state if g.get("unseen")})


# The links of a head whose predictive distribution is the model's own: one class is true, or each is a yes or no.
HEADS: tuple[tuple[str, ...], ...] = (("head: softmax",), ("head: sigmoid",))


def head_link(output: Tensor, classes: int, model_output: Any, config: Any) -> tuple[str, ...]:
    """One of `HEADS` if a layer's output is the logits that the model returned, of at least two classes; else ()."""
    logits = model_output if isinstance(model_output, Tensor) else getattr(model_output, "logits", None)
    if logits is None and isinstance(model_output, dict):
        logits = model_output.get("logits")
    problem = getattr(config, "problem_type", None)
    if logits is not output or classes < 2 or problem == "regression":
        return ()
    return HEADS[1] if problem == "multi_label_classification" else HEADS[0]
