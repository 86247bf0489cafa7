"""`LNGD`: Layer-Wise Natural Gradient Descent as a `torch.optim.Optimizer`."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import serialization
from .adoption import meet_shards
from .checks import check_lr, fishers_beside
from .config import LNGDConfig, is_due, settings_of
from .curvature.capture import Capture
from .curvature.compiled import plain_name, uncompiled
from .curvature.embeddings import EmbeddingLayer
from .curvature.fisher import FisherSource, unscaled
from .curvature.owners import Owners
from .curvature.pooling import pool_sums
from .curvature.rotated import RotatedTable
from .curvature.rounding import Rounding
from .curvature.topology import Group, Topology
from .distributed import Ranks
from .fallback import Fallback
from .groups import bias_share, check_added, make_groups, unshare_rate
from .layer_step import step_layers
from .preconditioner import Preconditioner, state_like
from .routing import LNGD_OWNER, Route, format_rates, format_routes, route
from .scaler import UnderScaler
from .seen import check_capture, check_rows
from .sharded_checkpoint import refuse_torchs_own
from .sharding import Shards, refuse_flat_parameters

NO_COPY = (
    "LNGD: got a copy or pickle of the optimizer, which watches one model. Accepted: its state_dict(), loaded into "
    "LNGD(model, …) made of a copy of the model"
)


class LNGD(UnderScaler, torch.optim.Optimizer):
    """Layer-Wise Natural Gradient Descent (Liu et al., NeurIPS 2024), with AdamW for what it does not own.

    A step, for the layers' gradients G (Algorithm 1 of the paper; names are `LNGDConfig`'s fields)::

        every factor_interval steps:    Φ, Ψ ← running averages of this step's factors     (Eq. 4, 5, 14)
        every inverse_interval steps:   inverses of the damped factors
        each step:                      D = direction(M or G; Φ, Ψ)
                                        W ← W − lr · α_l · D, with momentum and decoupled weight decay

    Args:
        model: the model that will be trained; its layers are watched by hooks during factor steps.
        config: the settings; none: those of the preset ``fast``.
        lr: α of the paper; with ``rate="rms"`` (the default) it means what it means for AdamW. Of a tensor each group
            gets a copy.
        process_group: the processes that train this model together, if these are not all of the job: the group that
            DDP was given. Each of them makes its LNGD and its steps; DDP averages the gradients. Make LNGD after
            ``init_process_group``: else the first factor step of ``sampled`` and ``true`` draws alike on all ranks.
            Under FSDP2 (`fully_shard`, best before LNGD is made) it is that of the parameters' mesh.
        **fields: fields of `LNGDConfig`, on top of `config`; see `LNGDConfig.with_fields`.

    The parameter groups are named by the key ``name``: ``lngd``, ``lngd_bias``, ``embedding``, ``fallback`` and
    ``fallback_no_decay``, those that are not empty. Schedulers act on all of them alike. ``lngd_bias`` has the biases
    that are part of their layer's update: they take it at the rate of that group.

    Raises:
        ValueError: a bad value (field, value and what is accepted are named), or nothing to train.
        RuntimeError: processes that disagree about the model or the settings; says what differs.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LNGDConfig | None = None,
        *,
        lr: float | Tensor = 1e-3,
        process_group: Any = None,
        **fields: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module (not its parameters)")
        check_lr(lr)
        self.config = config = settings_of(config, fields)
        refuse_flat_parameters(model)
        model = uncompiled(model)
        self._routing = route(model, config)
        self._parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self._rounding = Rounding(config.bf16_update, config.seed)
        self._fallback = Fallback(config.betas, config.eps, self._rounding)
        groups, self._names = make_groups(self._routing.routes, self._parameters, config, lr)
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._ranks = Ranks(process_group)
        # a rotated table is made of the gradient alone, which DDP has reduced
        self._embeddings: list[EmbeddingLayer | RotatedTable] = [
            RotatedTable(name, modules, config, self._rounding)
            if config.embedding == "rotated"
            else EmbeddingLayer(name, modules, config, self._ranks, self._rounding)
            for name, modules in self._routing.embeddings
        ]
        self._capture = Capture(
            model,
            self._routing.layers,
            FisherSource(config.fisher, config.seed, fishers_beside(config.fisher, config.family)),
            config,
        )
        self._preconditioner: Preconditioner | None = None
        self._steps = 0
        self._factor_seconds = 0.0
        self._ranks_agree = False  # looked at in the next step
        self._gatherers = [self._capture, *self._embeddings]
        for watcher in self._gatherers:  # an optimizer that is dropped takes its hooks along
            weakref.finalize(self, watcher.close).atexit = False
        self._shards: Shards | None = None
        meet_shards(self)
        self._check_ranks()
        self._arm()

    def _meet_parameters(self) -> bool:
        return meet_shards(self)

    def _check_ranks(self) -> None:
        """Do all ranks train the same model in the same way, from the same step on?"""
        parameters = {
            r.parameter: f"{list(r.shape)} {self._parameters[r.parameter].dtype}, {r.owner} ({r.reason}), number {i}"
            for i, r in enumerate(self._routing.routes)
        }
        settings = {f"{group['name']}.lr": float(group["lr"]) for group in self.param_groups}
        settings["steps made"] = self._steps
        self._ranks.check_same("the model, its settings or steps", self.config.to_dict() | settings | parameters)

    # The step

    @torch._disable_dynamo  # torch.compile leaves it as it is, where a whole training step is compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient rest.

        Raises:
            RuntimeError: the optimizer is closed; a factor step saw no forward pass, or (``fisher="true"``) no
                `fisher_backward`; ``rate="adaptive"`` did not see a layer's gradients.
        """
        if self._capture.closed:
            raise RuntimeError("LNGD.step(): this optimizer was closed; make a new one")
        refuse_torchs_own()
        meet_shards(self)
        if not self._ranks_agree:
            self._check_ranks()
            self._ranks_agree = True
        self._rounding.begin(self._steps)
        self._read_scaler(self.param_groups[0]["params"][0].device)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        made = self._preconditioner
        if self._shards is None and made is not None and made.was_left():  # model.to(…) in mid-training
            serialization.load(self, serialization.state_of(self))
        if any(layer.weight.grad is not None for layer in self._routing.layers):
            start = time.perf_counter()
            inside_hooks = self._capture.seconds
            try:
                check_rows(self.config, self._capture, self._routing.layers, self._ranks.size > 1)
                self._update_factors()
            except BaseException:
                self._arm()  # a step that was refused is over: the next one begins anew
                raise
            self._factor_seconds += time.perf_counter() - start + inside_hooks
            self._capture.seconds = 0.0
            groups = {group["name"]: group for group in self.param_groups}
            lr, decay = groups["lngd"]["lr"], groups["lngd"]["weight_decay"]
            assert self._preconditioner is not None
            terms = unscaled(self._capture.terms, self._loss_scale)
            samples = self._capture.rows
            share, made = bias_share(groups), self._preconditioner
            step_layers(made, samples, terms, self._shards, self._rounding, lr, decay, self._steps, share)
        for group in self.param_groups:
            if group["name"] == "embedding":
                for embedding in self._embeddings:
                    embedding.step(group, self._is_factor_step())
            elif group["name"] not in ("lngd", "lngd_bias"):
                self._fallback.step(group)
        self._steps += 1
        self._arm()
        return loss

    def _arm(self) -> None:
        """Get ready for the coming step."""
        made, factors = self._preconditioner, self._is_factor_step()
        self._capture.arm(factors, None if made is None else made.basis_of)
        if factors and self._ranks.size > 1:
            self._capture.source.restart(self._ranks.rank, self._steps)

    def _is_factor_step(self) -> bool:
        return is_due(self._steps, self.config.factor_interval, self.config) or self._preconditioner is None

    def _update_factors(self) -> None:
        capture = self._capture
        if self._is_factor_step():
            capture.look_round(p for group in self.param_groups for p in group["params"])
            sums = capture.finish(self._ranks.everyone)
            check_capture(self.config, capture, self._routing.layers, self._preconditioner is not None)
            if self._preconditioner is None:
                found = {"/".join(g["members"]): f"{g['links']} {g['stream']}" for g in capture.topology.state()}
                order = {"order of layers": list(found)}
                self._ranks.check_same("what follows the layers, and who shares an input", found | order)
                self._preconditioner = self._new_preconditioner(capture.topology)
            terms, drawn = capture.terms, capture.source.sampled_terms
            if sums:
                capture.source.check_terms(terms)
            if self._ranks.size > 1:
                groups, scalars = capture.topology.groups, [terms, drawn]
                owners = self._preconditioner.owners
                to_owners = None if owners is None else owners.sum
                halved = self.config.factor_dtype == "bfloat16"
                sums, (terms, drawn) = pool_sums(
                    sums, groups, capture.empty_sums, self._like_of, scalars, self._ranks, to_owners, halved
                )
            scale = capture.source.scale(terms, drawn, self._ranks.size, self._loss_scale) if sums else None
            self._preconditioner.update_factors(sums, scale, self._steps)
        assert self._preconditioner is not None
        self._preconditioner.refresh(self._steps)

    def _new_preconditioner(self, topology: Topology) -> Preconditioner:
        layers, owners = self._capture.layers, None
        if self._shards is not None:
            owners = Owners(topology.groups, layers, self.config.max_factor_dim, self._shards)
        return Preconditioner(layers, topology, self.config, self._ranks, owners)

    def _like_of(self, group: Group) -> Tensor:
        return state_like(self._capture.layers[group.name])

    # What a training loop may call

    def train(self) -> None:
        """Watch forward passes (the default); `Trainer` calls this before each micro-batch."""
        self._watch(True)

    def eval(self) -> None:
        """Look away, whatever the model does; `Trainer` calls this around evaluation."""
        self._watch(False)

    def _watch(self, enabled: bool) -> None:
        for watcher in self._gatherers:
            watcher.watch(enabled)

    def set_batch(self, inputs: Mapping[str, Any]) -> None:
        """Name the batch of the next forward, where the model does not see all of it (labels taken out before).

        ``labels`` [B, T] (−100: ignored), ``attention_mask`` [B, S] and ``decoder_attention_mask`` [B, T] are used.
        """
        self._capture.set_batch(inputs)

    @property
    def needs_fisher_pass(self) -> bool:
        """True in a factor step with ``fisher="true"``: call :meth:`fisher_backward` after the forward."""
        return self.config.fisher == "true" and self._is_factor_step()

    def fisher_backward(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """``fisher="true"``: the second backward pass, with labels drawn from softmax(logits). ``.grad`` is untouched.

        Args:
            logits: [..., classes], of the forward just made, before its graph is freed by ``loss.backward()``.
            mask: [...], True (or a label other than −100 made so) where a position counts.
        """
        self._capture.settle()
        with torch.enable_grad():
            self._capture.source.backward(logits, mask)

    def close(self) -> None:
        """Remove every hook from the model. The optimizer cannot step afterwards without `RuntimeError`."""
        self._capture.close()
        for embedding in self._embeddings:
            embedding.close()

    # What it tells

    def routing(self) -> list[Route]:
        """Each parameter's owner and the reason; after the first step also what was found to follow each layer."""
        links = {name: group.links for name, group in self._capture.topology.of_layer.items()}
        return [
            dataclasses.replace(r, follows=" → ".join(links[r.layer]) or "identity")
            if r.owner == LNGD_OWNER and r.layer in links
            else r
            for r in self._routing.routes
        ]

    def routing_table(self) -> str:
        """The routing as a printable table, and below it what `lr` means for each owner."""
        return f"{format_routes(self.routing())}\n\n{format_rates(self.config)}"

    def factors(self, name: str) -> dict[str, Tensor]:
        """The factors of a layer by module name: running averages, start-up bias corrected, undamped.

        ``lngd``: ``phi`` Φ [d, d], ``psi`` Ψ [m]. ``kfac``: ``a`` A [d, d], ``b`` B [m, m]. ``ekfac``: these, their
        eigenvectors ``basis_a`` and ``basis_b`` in columns, and ``moments`` s, a row for each of B's, a column for each
        of A's. ``tkfac``: ``delta``, ``p`` [d, d], ``q`` [m, m]. ``ng+``: ``left`` [m, m] or ``right`` [d, d].

        d is the number of columns of the layer's matrix: kernel times channels of a convolution; a grouped one has its
        groups in a first dimension. Where factors are cut into blocks, zeros stand outside these. Under FSDP2 a
        collective.

        Raises:
            KeyError: no such layer (the names are listed), or no factor step so far.
        """
        if name not in self._capture.layers:
            raise KeyError(f"no LNGD layer '{name}'; there are: {', '.join(self._capture.layers) or 'none'}")
        if self._preconditioner is None:
            raise KeyError(f"layer '{name}' has no factors before the first step")
        return self._preconditioner.factors(name)

    def memory_usage(self) -> dict[str, int]:
        """Bytes of this rank: ``momentum``, ``factors``, ``inverses``, ``embeddings``, ``fallback``, ``rounding`` (what
        bfloat16 weights lack), ``total``."""
        return serialization.memory_usage(self)

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log; waits for the device, so for logging steps only. Seconds are reset by the call.

        ``failed_inverses``, ``skipped_factors`` and ``skipped_gradients`` count what was passed over: an inverse that
        failed, a factor, a gradient (of AdamW: a step of a group) that was not finite. The last since this object was
        made, the others are part of the state. Under FSDP2 a collective: call it on every rank.
        """
        result = {} if self._preconditioner is None else self._preconditioner.diagnostics()
        others = float(self._fallback.skipped) + sum(float(embedding.skipped) for embedding in self._embeddings)
        result["skipped_gradients"] = result.get("skipped_gradients", 0.0) + others
        result["factor_seconds"], self._factor_seconds = self._factor_seconds, 0.0
        return result

    # State

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with one more key, ``lngd``: all of LNGD's state, loadable with ``weights_only=True``.

        Under FSDP2 a collective: call it on every rank. Rank 0's is whole, on the CPU; others hold nothing of it.
        """
        refuse_torchs_own()
        state = super().state_dict()
        state["lngd"] = serialization.state_of(self)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore bit for bit, dtypes kept.

        Raises:
            ValueError: another optimizer's state, another version, another model or config; says what differs.
                Nothing is changed then.
        """
        meet_shards(self)
        state = dict(state_dict)
        own = serialization.check(self, state.pop("lngd", None))
        super().load_state_dict(state)  # type: ignore[arg-type]
        for group in self.param_groups:
            unshare_rate(group)
        serialization.load(self, own)
        self._ranks_agree = False
        self._arm()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError (copy.copy, copy.deepcopy, pickle): a copy would watch the model of the original."""
        raise TypeError(NO_COPY)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters added later are AdamW's: no layer of the model is known to own them.

        Raises:
            ValueError: the name of one of LNGD's own groups, as in a copy of one.
        """
        if isinstance(param_group, dict):  # else torch says what it takes
            name = param_group.setdefault("name", "added")
            if name not in self._names or any(group["name"] == name for group in self.param_groups):
                check_added(name)
            param_group.setdefault("lr", self.defaults["lr"])
            unshare_rate(param_group)
        super().add_param_group(param_group)
