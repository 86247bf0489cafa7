"""Which layers read the same tensor and so share one Φ; for the paper's directions also which activation follows. Found
once, by identity (``is``) of live tensors within a forward pass, then kept by module name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
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

    def enter(self, group: Group) -> Group:
        """The group of these layers here: theirs who are known, which the others then join, or else a new one."""
        known = next((self.of_layer[name] for name in group.members if name in self.of_layer), None)
        if known is None:
            known = Group([], group.follows, group.source)
            self.groups.append(known)
        for name in group.members:
            if name not in self.of_layer:
                known.members.append(name)
                self.of_layer[name] = known
        return known

    def without(self, layers: Collection[str]) -> Topology:
        """A copy that knows nothing of those of these layers that were never called; not frozen."""
        unseen = self.unseen.intersection(layers)
        groups = [replace(group, members=list(group.members)) for group in self.groups if group.name not in unseen]
        return Topology(groups, unseen=self.unseen - unseen)

    @classmethod
    def common(cls, states: Iterable[list[dict[str, Any]]]) -> Topology:
        """The groups that processes saw, of whose :meth:`state` these are, the same on all: of two that group layers
        otherwise the first is right. Not frozen. RuntimeError: they saw something else behind a layer."""
        found, seen_by = cls(), dict[str, int]()
        for rank, topology in enumerate(map(cls.from_state, states)):
            for group in topology.groups:
                if group.name in topology.unseen:
                    continue
                known = found.enter(group)
                first = seen_by.setdefault(known.name, rank)
                if known.follows != group.follows:
                    raise RuntimeError(
                        f"LNGD: the ranks disagree about what follows the layers: {known.name}: rank {first} has "
                        f"{list(known.follows)}, rank {rank} has {list(group.follows)}. Accepted: the same on all"
                    )
        return found

    def freeze(self, layers: list[str]) -> None:
        """End the search: layers that were never called get a group of their own, empty until they are."""
        for name in layers:
            if name not in self.of_layer:
                self.enter(Group([name], (), OPEN))
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
