"""Which layers read the same tensor and so share one Φ; for the paper's directions also which activation follows. Found
once, by identity (``is``) of live tensors within a forward pass, then kept by module name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .masks import OPEN


@dataclass
class Group:
    """Layers that share one Φ: they read the same tensor, with the same mask, and nothing that counts follows.

    Attributes:
        members: layer names; the first names the group.
        follows: what follows the only member, see `paper.chains`; empty: φ' = 1.
        source: which of the batch's masks applies, see `masks.BatchMasks`; `masks.OPEN`: each batch tells."""

    members: list[str]
    follows: tuple[str, ...] = ()
    source: str | None = None

    @property
    def name(self) -> str:
        """The first member."""
        return self.members[0]


@dataclass
class Topology:
    """The groups of a model, in the order in which they were seen. `frozen` after the first step with statistics;
    `unseen`: the layers that no rank had called by then."""

    groups: list[Group] = field(default_factory=list)
    frozen: bool = False
    unseen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.of_layer: dict[str, Group] = {name: group for group in self.groups for name in group.members}

    def add(self, layer: str, follows: tuple[str, ...], source: str | None) -> Group:
        """A new group with this layer alone."""
        self.groups.append(Group([], follows, source))
        return self.join(layer, self.groups[-1])

    def join(self, layer: str, group: Group) -> Group:
        """Let a layer share a group's Φ."""
        group.members.append(layer)
        self.of_layer[layer] = group
        return group

    def learn(self, everyone: list[list[dict[str, Any]]]) -> None:
        """Take in the groups that other ranks saw and this one did not call, in an order that is the same on all."""
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
        found = []
        for g in self.groups:
            own: dict[str, Any] = {"members": list(g.members), "follows": list(g.follows), "source": g.source or ""}
            found.append({**own, "unseen": g.name in self.unseen})
        return found

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Topology:
        """The inverse of :meth:`state`."""
        groups = [Group(list(g["members"]), tuple(g["follows"]), g["source"] or None) for g in state]
        return cls(groups, frozen=True, unseen={g["members"][0] for g in state if g.get("unseen")})

    @classmethod
    def unshared(cls, layers: list[str]) -> Topology:
        """Each layer by itself: what holds before anything was seen."""
        return cls([Group([name], (), OPEN) for name in layers])
