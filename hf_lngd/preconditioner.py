"""The banks of a model: which factors and layers are computed together, made once the topology is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_precision
from .config import LNGDConfig
from .curvature.factor_bank import Bank, FactorBank, FactorSpec
from .curvature.families import FAMILIES, FamilyBank
from .curvature.family_sums import Basis, FamilySums
from .curvature.layer_bank import LayerBank, gram_side
from .curvature.layers import Layer, factor_blocks, sides_of
from .curvature.owners import Owners
from .curvature.pooling import Pool
from .curvature.rounding import Draws
from .curvature.spreading import SpreadInverses
from .curvature.sums import GroupSums
from .curvature.topology import Group, Topology

# A bank's momentum has at most so many elements: bounds the step's temporaries, which are as large.
_BANK_ELEMENTS = 1 << 24


class Preconditioner:
    """All factors and layers of a model, in banks of one shape.

    Args:
        layers: the owned layers by name.
        topology: who shares Φ with whom; frozen.
        config: the optimizer's.
        pool: the processes that train the model.
        owners: which rank keeps what; None: each keeps all. Banks are the same ones on every rank, with the rows that
            it keeps, if any.
    """

    def __init__(
        self,
        layers: dict[str, Layer],
        topology: Topology,
        config: LNGDConfig,
        pool: Pool,
        owners: Owners | None = None,
    ) -> None:
        self.layers, self.config, self.pool, self.owners = layers, config, pool, owners
        self.factor_banks: list[Bank] = []
        self.factor_members: list[list[FactorSpec]] = []  # of each of these banks the groups of all ranks
        self.layer_banks: list[LayerBank] = []
        self._bank_of_group: dict[str, Bank] = {}
        self._make_factor_banks(topology.groups)
        self._make_layer_banks(topology)
        self._spread = SpreadInverses(config.placement, pool)
        self._draws = Draws(config.seed, "factors")
        self.bank_of_layer = {layer.name: (bank, i) for bank in self.layer_banks for i, layer in enumerate(bank.layers)}

    def _make_factor_banks(self, groups: list[Group]) -> None:
        interval = self.config.inverse_interval if self.config.stagger else 1
        keyed: dict[tuple, list[tuple[FactorSpec, int]]] = {}
        for number, group in enumerate(groups):
            members = [self.layers[name] for name in group.members]
            kinds = frozenset(needed_kind(layer, self.config) for layer in members)
            like = state_like(members[0])
            limit = self.config.max_factor_dim
            layout = factor_blocks(members, limit) if self.config.family == "lngd" else sides_of(members[0], limit)
            key = (layout, kinds, like.device, like.dtype)
            offset = number * interval // len(groups)
            keyed.setdefault(key, []).append((self._spec(group), offset))
        for (layout, kinds, device, dtype), everyone in keyed.items():
            self.factor_members.append([spec for spec, _ in everyone])
            entries = [e for e in everyone if self.owners is None or self.owners.has_group(e[0].name)]
            specs, offsets = [spec for spec, _ in entries], [offset for _, offset in entries]
            like = torch.empty(0, device=device, dtype=dtype)
            bank: Bank
            if self.config.family == "lngd":
                bank = FactorBank(specs, layout, kinds, offsets, self.config, like)
            else:  # whose groups have one member each
                bank = FAMILIES[self.config.family](specs, layout, offsets, self.config, like)
            self.factor_banks.append(bank)
            self._bank_of_group.update({spec.name: bank for spec, _ in everyone})

    def _spec(self, group: Group) -> FactorSpec:
        first = self.layers[group.name]
        scale = 1.0 if group.estimates_psi(self.config.fisher) else float(first.out_features)
        return FactorSpec(group.name, first.columns, scale, first.units)

    def _make_layer_banks(self, topology: Topology) -> None:
        keyed: dict[tuple, list[Layer]] = {}
        for layer in self.layers.values():
            group = topology.of_layer[layer.name]
            shared = id(self._bank_of_group[group.name])
            ours = self.config.family == "lngd"
            estimated = ours and group.estimates_psi(self.config.fisher)
            key = (layer.units, layer.out_features, layer.columns, layer.bias_name is None, shared, estimated)
            keyed.setdefault(key, []).append(layer)
        before = 0
        for (units, m, columns, _, _, estimated), members in keyed.items():
            most = max(1, _BANK_ELEMENTS // (units * m * columns))
            for start in range(0, len(members), most):
                chunk = members[start : start + most]
                groups = [topology.of_layer[layer.name].name for layer in chunk]
                factors = self._bank_of_group[groups[0]]
                like = state_like(chunk[0])
                kept = [name for name in groups if self.owners is None or self.owners.has_group(name)]
                rows = torch.tensor(factors.rows_of(kept), dtype=torch.int64, device=like.device)
                bank = LayerBank(chunk, factors, rows, estimated, before, self.config, like, self.pool, self.owners)
                self.layer_banks.append(bank)
                before += len(chunk)

    def was_left(self) -> bool:
        """Whether a layer was moved to another device, or to a dtype whose state is kept in another one.

        Raises:
            ValueError: to float16.
        """
        for bank in self.layer_banks:
            for layer in bank.layers:
                weight = layer.weight
                check_precision(layer.weight_name, weight)
                dtype = torch.promote_types(weight.dtype, torch.float32)
                if weight.device != bank.momentum.device or dtype != bank.momentum.dtype:
                    return True
        return False

    def update_factors(
        self, sums: Mapping[str, GroupSums | FamilySums], scale: Tensor | float | None, step: int
    ) -> None:
        """Take one step's sums, of all processes, into the running averages (Eq. 4, 5, 14)."""
        self._draws.begin(step)
        phi: dict[str, Tensor] = {}
        psi: dict[str, Tensor] = {}
        statistics: dict[str, dict[str, Tensor]] = {}
        seen = {name: group.kept > 0 for name, group in sums.items() if isinstance(group.kept, Tensor)}
        for name, group in sums.items():
            if isinstance(group, FamilySums):
                if group.parts:
                    statistics[name] = group.factors(scale)
                continue
            if group.s is None:
                continue
            phi[name], own = group.factors(scale)
            if own is not None:
                psi[name] = own
        for factor_bank in self.factor_banks:
            factor_bank.update(statistics if isinstance(factor_bank, FamilyBank) else phi, seen, self._draws)
        for layer_bank in self.layer_banks:
            layer_bank.update_psi(psi)

    def refresh(self, step: int) -> None:
        """Invert what is due at this step."""
        due = [(bank, rows) for bank in self.factor_banks if (rows := bank.due(step))]
        spread = self._spread.plan(due) if self.pool.size > 1 and self.owners is None else None
        if spread is not None:
            self._spread.invert(spread)
        else:
            for bank, rows in due:
                bank.invert(rows)
        for bank in self.factor_banks:  # all of them in the first step
            bank.inverted = True

    def basis_of(self, name: str) -> Basis | None:
        """The coordinates in which a group's coming sums are wanted, see `FamilyBank.basis_of`."""
        bank = self._bank_of_group[name]
        return bank.basis_of(name) if isinstance(bank, FamilyBank) else None

    def factors(self, name: str) -> dict[str, Tensor]:
        """The family's factors of a layer as it defines them, undamped, see `LNGD.factors`; with a grouped
        convolution's groups in a first dimension."""
        if self.owners is None:
            return self._factors(name)
        found = {k: v.cpu() for k, v in self._factors(name).items()} if self.owners.has_layer(name) else None
        shared = self.owners.shards.ranks.share(found, self.owners.of_layer[name])
        return {key: value.to(self.layers[name].weight.device) for key, value in shared.items()}

    def _factors(self, name: str) -> dict[str, Tensor]:
        bank, i = self.bank_of_layer[name]
        own = bank.rows_of([i])
        if isinstance(bank.factors, FamilyBank):
            found = bank.factors.factors(bank.rows[own])
            return found if bank.units > 1 else {key: value[0].clone() for key, value in found.items()}
        assert isinstance(bank.factors, FactorBank)
        columns = self.layers[name].columns
        blocks = bank.factors.dense(bank.rows[own]) * bank.scale
        phi = torch.stack([torch.block_diag(*unit)[:columns, :columns] for unit in blocks])
        psi = bank.dense_psi(own)
        return {"phi": phi, "psi": psi} if bank.units > 1 else {"phi": phi[0], "psi": psi[0].clone()}

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log, of all ranks' layers; waits for the device once."""
        rates = torch.cat([bank.rate.flatten().double() for bank in self.layer_banks])
        damping = torch.cat([bank.damping.flatten().double() for bank in self.factor_banks])
        conditions = torch.cat([bank.condition.flatten().double() for bank in self.factor_banks])
        failures = [bank.failures for bank in self.factor_banks] + [bank.failures for bank in self.layer_banks]
        numbers = [
            *(t for values in (rates, damping) for t in (values.sum(), values.new_tensor(values.numel()))),
            torch.stack(failures).sum(),
            torch.stack([bank.skipped for bank in self.factor_banks]).sum(),
            torch.stack([bank.skipped for bank in self.layer_banks]).sum(),
            conditions.amax() if len(conditions) else rates.new_tensor(-torch.inf),
        ]
        own = torch.stack([number.double() for number in numbers]).tolist()
        everyone = [own] if self.owners is None else self.owners.shards.ranks.everyone(own)
        *sums, _ = (sum(column) for column in zip(*everyone, strict=True))
        rate, layers, damped, rows, failed, skipped, gradients = sums
        return {
            "layer_rate_mean": rate / layers,
            "damping_mean": damped / rows,
            "condition_max": max(values[-1] for values in everyone),
            "failed_inverses": failed,
            "skipped_factors": skipped,
            "skipped_gradients": gradients,
        }


def needed_kind(layer: Layer, config: LNGDConfig) -> str:
    """``inverse`` (Φ̂⁻¹), ``root`` (Φ̂^(−1/2)) or ``whitener`` (V, VᵀV = Φ̂⁻¹), whatever the direction takes of Φ."""
    if config.direction == "natural":
        return "inverse"
    if config.direction == "polar":
        return "whitener"
    # with the Gram matrix on the left, both roots stand side by side and only their product is needed
    return "root" if gram_side(layer.out_features, layer.columns) == "right" else "inverse"


def state_like(layer: Layer) -> Tensor:
    """An empty tensor with the device of a layer's state and its dtype: at least float32."""
    weight = layer.weight
    return torch.empty(0, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
