"""How the layers of a model hang together: who reads the same tensor, and what follows whom.

Found once, by identity (``is``) of live tensors within a forward pass, then kept by module name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Group:
    """Layers that share one Φ: they read the same tensor, with the same mask, and none feeds an activation.

    A layer that feeds an activation, or that is seen under a Fisher which differs a layer, is alone in its group.

    Attributes:
        members: layer names; the first names the group.
        activation: module name of the elementwise function after the only member, or None (φ' = 1).
        stream: which of the batch's masks applies, see `masks.BatchMasks`.
    """

    members: list[str]
    activation: str | None = None
    stream: str | None = None

    @property
    def name(self) -> str:
        """The first member."""
        return self.members[0]


@dataclass
class Topology:
    """The groups of a model, in the order in which they were seen. `frozen` after the first step."""

    groups: list[Group] = field(default_factory=list)
    frozen: bool = False

    def __post_init__(self) -> None:
        self.of_layer: dict[str, Group] = {name: group for group in self.groups for name in group.members}

    def add(self, layer: str, activation: str | None, stream: str | None) -> Group:
        """A new group with this layer alone."""
        group = Group([layer], activation, stream)
        self.groups.append(group)
        self.of_layer[layer] = group
        return group

    def join(self, layer: str, group: Group) -> None:
        """Let a layer share a group's Φ."""
        group.members.append(layer)
        self.of_layer[layer] = group

    def freeze(self, layers: list[str]) -> None:
        """End the search: layers that were never called get a group of their own, empty until they are."""
        for name in layers:
            if name not in self.of_layer:
                self.add(name, None, None)
        self.frozen = True

    def state(self) -> list[dict[str, Any]]:
        """Plain lists and strings, for a checkpoint."""
        return [
            {"members": list(g.members), "activation": g.activation or "", "stream": g.stream or ""}
            for g in self.groups
        ]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Topology:
        """The inverse of :meth:`state`."""
        groups = [Group(list(g["members"]), g["activation"] or None, g["stream"] or None) for g in state]
        return cls(groups, frozen=True)
