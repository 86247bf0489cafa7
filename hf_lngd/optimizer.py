"""`LNGD`: Layer-Wise Natural Gradient Descent as a `torch.optim.Optimizer`."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from . import norms, state
from .adamw import full_precision
from .batches import Job, LayerBatch
from .config import LNGDConfig, LNGDFields, settings_of
from .core import Core
from .directions import Inputs, of_units, psi_interval
from .groups import Options, StepOptions, check_lr, make_groups, options_of
from .linalg import along, squared_norms
from .parallel.adopt import adopt_shards
from .parallel.layout import make_layout
from .routing import LNGD_OWNER, UNSAVED, Route, format_rates, format_routes, route, unwrapped
from .topology import Topology
from .torch_internals import check_not_flat, local, stepping_scaler


class LNGD(torch.optim.Optimizer):
    """Layer-Wise Natural Gradient Descent (Liu et al., NeurIPS 2024), with AdamW for all other parameters.

    A step, for the layers' gradients G (Algorithm 1 of the paper; names are `LNGDConfig`'s fields, k is
    update_interval)::

        every factor_interval steps:    Φ ← running average of this step's factor      (Eq. 4, 5, 14)
        every inverse_interval steps:   inverse or whitener of the damped Φ
        each step:                      M ← τ M + (1 − τ) G
        in a layer's turn:              D = direction(M; Φ)
                                        W ← W − k · lr · (α_l · D + weight_decay · W)

    Args:
        model: the model that will be trained; hooks on its layers collect statistics in factor steps.
        config: the options; none: those of the preset ``fast``. `fields` of `LNGDConfig` stand above it.
        lr: α of the paper; with ``rate="rms"`` (the default) it means what it means for AdamW. Of a tensor each group
            gets a copy.
        param_groups: parameters with rates of their own: dicts with ``params`` (a regular expression that is searched
            in names, or names, or parameters) and any of ``lr``, ``weight_decay`` (which mean what they mean here),
            ``lr_scale``, ``betas``, ``eps``, ``name``. Each makes a group for each kind of parameter in it.
        layout: ``whole``: every process computes everything. ``owned``: under DDP each computes its share of the
            layers, and has their momentum and factors alone; `state_dict` is a collective then. ``auto``: owned where
            it pays. Under FSDP2 it is found.
        process_group: the processes that train this model together, if these are not all of the job: the group that
            DDP was given. Make LNGD after ``init_process_group``. Under FSDP2 (`fully_shard`, best before LNGD is made)
            it is that of the mesh.

    Groups have ``name``, ``lr``, ``lr_scale``, ``weight_decay``, ``decay_floor`` (below that share of their first norm
    weights decay no more; 0: always), ``betas`` and ``eps``, which are read in each step.
    They are named after their kind: ``lngd``, ``lngd_bias``, ``embedding``, ``fallback``, ``fallback_no_decay``. A
    parameter's rate is lr · lr_scale: `lr` is the same for all kinds, so that schedulers which write absolute rates
    keep the ratio. ``betas[0]`` is the momentum; ``betas[1]`` of ``lngd`` is the decay of the row scale.
    ``lngd_bias`` has the biases that are part of their layer's update: they take it at the rate of that group.

    Raises:
        ValueError: a bad value (field, value and what is accepted are named), or nothing to train.
        RuntimeError: processes that disagree about the model or the options; says what differs."""

    def __init__(
        self,
        model: nn.Module,
        config: LNGDConfig | None = None,
        *,
        lr: float | Tensor = 1e-3,
        param_groups: Sequence[dict[str, Any]] = (),
        layout: str = "whole",
        process_group: Any = None,
        **fields: Unpack[LNGDFields],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: got {type(model).__name__}, accepted: a torch.nn.Module (not its parameters)")
        check_lr(lr)
        self.config = config = settings_of(config, fields)
        check_not_flat(model)
        model = unwrapped(model)
        routing = route(model, config)
        super().__init__(make_groups(routing, config, lr, param_groups), options_of("added", config, lr))
        shares = make_layout(layout, config, routing.layers, process_group)
        self.core = Core(model, config, routing, shares, self.state)
        for collector in self.core.collectors:  # an optimizer that is dropped takes its hooks along
            weakref.finalize(self, collector.close).atexit = False
        self._group, self._options = process_group, StepOptions(())
        self._loss_scale: Tensor | None = None
        self._seconds, self._ranks_agree = 0.0, False  # the latter is asked in the next step
        self.adopt()
        self._check_ranks()
        self._arm()

    def adopt(self) -> bool:
        """Take over parameters that FSDP2 has put in the place of the model's own; were there any? Each step asks."""
        replaced = adopt_shards(self.core, self._group)
        for group in self.param_groups if replaced else ():
            group["params"] = [replaced.get(p, p) for p in group["params"]]
        return bool(replaced)

    def _check_ranks(self) -> None:
        """Do all ranks train the same model in the same way, from the same step on?"""
        routing = self.core.routing
        parameters = {
            r.parameter: f"{list(r.shape)} {routing.parameters[r.parameter].dtype}, {r.owner} ({r.reason}), number {i}"
            for i, r in enumerate(routing.routes)
        }
        rates = {f"{group.get('name', i)}.lr": float(group["lr"]) for i, group in enumerate(self.param_groups)}
        own = self.config.to_dict() | rates | {"steps made": self.core.steps, "layout": self.core.layout.name}
        self.core.layout.everyone.check_same("the model, its settings or steps", own | parameters)

    @torch._disable_dynamo  # torch.compile leaves it as it is, where a whole training step is compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient rest.

        Raises:
            RuntimeError: the optimizer is closed; ``fisher="true"`` saw no `fisher_backward`, ``rate="adaptive"`` no
                gradients of a layer.
            ValueError: a parameter is in two groups."""
        core = self.core
        if core.capture.closed:
            raise RuntimeError("LNGD.step(): this optimizer was closed; make a new one")
        self.adopt()
        if not self._ranks_agree:
            self._check_ranks()
            self._ranks_agree = True
        self._read_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        core.states = self.state  # which a user may have put another in the place of
        self._options = StepOptions(self.param_groups)
        if core.capture.armed or all(parameter.grad is None for parameter in self._options):
            kept = (core.routing.parameters[r.parameter] for r in core.routing.routes if r.reason == UNSAVED)
            core.capture.warn_of_untrained(chain(self._options, kept))
        core.capture.warn_of_idle()
        if any(layer.weight.grad is not None for layer in core.routing.layers):
            start, in_hooks = time.perf_counter(), core.capture.seconds
            try:
                self._update_factors()
            except BaseException:
                self._arm()  # a step that raised is over: the next one begins anew
                raise
            if self._is_factor_step():
                weights = [layer.weight for layer in core.routing.layers if layer.weight in self._options]
                norms.measure(weights, core.states, core.layout)
                for batch in core.batches:  # there may be first norms of others now
                    batch.forget_norms()
            self._seconds += time.perf_counter() - start + in_hooks
            core.capture.seconds = 0.0
            self._step_layers()
        self._step_others()
        core.count += 1
        self._arm()
        return loss

    def _update_factors(self) -> None:
        core, capture = self.core, self.core.capture
        if core.batches and core.lost_state():
            state.clear(core)
        elif core.batches and not core.layout.shards_rows and core.was_moved():  # model.to(…) in mid-training
            state.rebuild(core, core.built.topology)
        capture.check_gradients()
        first = False
        if capture.armed:
            statistics = capture.finish(core.layout.everyone.all_gather_value)
            capture.check()
            if capture.topology.frozen and core.built.topology is not capture.topology:
                state.rebuild(core, capture.topology)
            if capture.topology.groups:
                if core.update_factors(statistics, self._loss_scale):
                    state.rebuild(core, core.built.topology)
                first = not core.started
        if not core.batches:  # nothing was seen: each layer by itself, with the identity for its factor
            known = capture.topology if capture.topology.frozen else None
            state.rebuild(core, known or Topology.unshared([layer.name for layer in core.routing.layers]))
        if first or (core.started and core.steps % self.config.inverse_interval == 0):
            core.invert()

    def _step_layers(self) -> None:
        """Momentum, direction and update of the layers that have a gradient and are in a group."""
        jobs = []
        for batch in self.core.batches:
            present = [y for y in batch.members if y.weight.grad is not None and y.weight in self._options]
            if present:
                jobs.append(Job(batch, present))
        self._find_unusable(jobs)
        for together in self.core.layout.rounds(jobs):
            self._step_jobs(together)

    def _step_jobs(self, jobs: list[Job]) -> None:
        core, layout, rate_of = self.core, self.core.layout, self.core.method.rate
        on_gradient = self.config.momentum_on == "gradient"
        parts = [layout.stack(layout.with_momentum(job), _gradient) for job in jobs]
        for job, own in zip(jobs, parts, strict=True):
            for part in own:
                part.masked_fill_(along(of_units(job.unusable, len(part) // len(job.unusable)), part), 0.0)
        for job, own in zip(jobs, parts, strict=True) if on_gradient else ():
            self._average(job, own)
        due = [found for job, own in zip(jobs, parts, strict=True) if (found := self._due(job, own))]
        if not due:
            return
        jobs, parts = [job for job, _ in due], [own for _, own in due]
        gradients = layout.to_owners(jobs, parts)
        updates: list[Tensor | None] = [None] * len(jobs)
        rates: list[Tensor | None] = [None] * len(jobs)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                updates[i], rates[i] = self._direction(jobs[i], gradient)
        if rate_of is not None:
            rates = rate_of(core, jobs, updates, gradients, self._loss_scale)
        for job, update, rate in zip(jobs, updates, rates, strict=True):
            if update is None or rate is None:
                continue
            if rate_of is not None:
                update.mul_(along(of_units(rate * self._options.of(job.layers, "lr"), job.batch.units), update))
            job.batch.rate[job.batch.index(job.layers, 1)] = rate
        for job, own in zip(jobs, layout.from_owners(jobs, updates), strict=True):
            if not on_gradient:
                self._average(job, own)
            self._subtract(job, own)

    def _due(self, job: Job, parts: list[Tensor]) -> tuple[Job, list[Tensor]] | None:
        """What of a job and its stacks is of the layers whose turn it is; None: there are none."""
        core, layout = self.core, self.core.layout
        if core.interval == 1:
            return job, parts
        turn = core.steps % core.interval
        due = Job(job.batch, [layer for layer in job.members if core.built.turn_of[layer.name] == turn])
        if not due.members:
            return None
        layers, here = layout.with_momentum(job), layout.with_momentum(due)
        if not here:
            return due, []
        first, last = layers.index(here[0]), layers.index(here[-1])  # side by side, as a batch is in order of turns
        each = [len(part) // len(layers) for part in parts]
        return due, [part[first * n : (last + 1) * n] for part, n in zip(parts, each, strict=True)]

    def _find_unusable(self, jobs: list[Job]) -> None:
        """Tell each job whose gradient is not finite, or overflows squared: zeros take its place, as it would stay in
        the momentum for good."""
        layout = self.core.layout
        layers = [layout.with_momentum(job) for job in jobs]
        gradients = [_gradient(p) for own in layers for layer in own for p in layer.parameters]
        if not gradients:
            return
        (squares,) = layout.complete([squared_norms(gradients)])
        bad = ~(squares < torch.inf)
        sizes = [len(own) * len(own[0].parameters) if own else 0 for own in layers]
        for job, own, some in zip(jobs, layers, bad.split(sizes), strict=True):
            some = some if len(some) == len(own) else some.view(len(own), -1).any(1)
            job.unusable = some.to(job.batch.rate.device)
        self.core.skipped_gradients = self.core.skipped_gradients + bad.sum()

    def _average(self, job: Job, parts: list[Tensor]) -> None:
        """Of gradients: M ← τ M + (1 − τ) G; parts become τ M + (1 − τ) G once more (Nesterov). Of updates: M ← τ M +
        lr α_l D (Algorithm 1); parts become M."""
        if not parts:
            return
        layout, momentum = self.core.layout, self.core.built.momentum
        layers = layout.with_momentum(job)
        kept = [local(momentum[parameter]) for layer in layers for parameter in layer.parameters]
        new = [value for _, values in layout.unstack(layers, parts) for value in values]  # views of parts
        tau = self._options.of(layers, "momentum")
        if isinstance(tau, Tensor):  # groups differ
            tau = [own for layer, own in zip(layers, tau, strict=True) for _ in layer.parameters]
        if self.config.momentum_on == "gradient":
            torch._foreach_lerp_(kept, new, [1 - own for own in tau] if isinstance(tau, list) else 1 - tau)
            torch._foreach_lerp_(new, kept, tau)
        else:
            torch._foreach_mul_(kept, tau)
            torch._foreach_add_(kept, new)
            torch._foreach_copy_(new, kept)

    def _direction(self, job: Job, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, layers, index = job.batch, job.layers, job.batch.index(job.layers)
        own = {key: value[index] for key, value in batch.state.items()}  # views, where it is a slice
        assert batch.bank is not None
        lr, peak_lr, beta2 = (self._options.of(layers, name) for name in ("lr", "peak_lr", "beta2"))
        if batch.first_rms is None:
            batch.first_rms = norms.first_rms(batch.layers, self.core.states)
        first_rms = batch.first_rms[batch.index(layers, 1)]
        k = self.core.interval
        found = self.core.method.direction(
            Inputs(
                gradient, layers, batch.bank, batch.rows[index], own, self.core.steps // k, psi_interval(k), k * lr,
                k * peak_lr, beta2, first_rms,
            )
        )  # fmt: skip
        for key, value in own.items() if not isinstance(index, slice) else ():
            batch.state[key][index] = value
        return found

    def _subtract(self, job: Job, parts: list[Tensor]) -> None:
        """W ← W − k · lr · decay · W − update; a bias takes its part at the rate of its own group."""
        options, k, weights, biases = self._options, self.core.interval, [], []
        for layer, (change, *bias_change) in self.core.layout.unstack(job.members, parts):
            own = options[layer.weight]
            weights.append((layer.weight, change, own))
            if layer.bias is not None and layer.bias in options:
                other = options[layer.bias]
                biases.append((layer.bias, bias_change[0] * _share(own.lr, other.lr), other))
        for changes in (weights, biases) if biases else (weights,):
            with full_precision([parameter for parameter, _, _ in changes], self.core.states) as values:
                decays = [self._decay_of(job.batch, parameter, own) for parameter, _, own in changes]
                if any(decays):
                    kept: Any = [1 - k * own.lr * decay for (_, _, own), decay in zip(changes, decays, strict=True)]
                    torch._foreach_mul_(values, kept)
                torch._foreach_sub_(values, [change for _, change, _ in changes])

    def _decay_of(self, batch: LayerBatch, parameter: nn.Parameter, own: Options) -> float:
        if not own.decay_floor:
            return own.weight_decay
        if parameter not in batch.left:
            batch.left[parameter] = norms.left_of(parameter, self.core.states)
        return own.weight_decay * norms.decay_share(batch.left[parameter], own.decay_floor)

    def _step_others(self) -> None:
        """AdamW, and embeddings by token frequency."""
        core, tables = self.core, self.core.tables
        for group, own in zip(self.param_groups, self._options.groups, strict=True):
            for parameter in group["params"]:
                if parameter in tables:
                    tables[parameter].step(own, core.states, core.layout)
            others = [p for p in group["params"] if p not in tables and p not in core.in_layers and p.grad is not None]
            core.adamw.step(others, own, core.states, core.layout)

    def _is_factor_step(self) -> bool:
        return self.core.steps % self.config.factor_interval == 0 or not self.core.started

    def _arm(self) -> None:
        self.core.arm(self._is_factor_step())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: the scaler unscales the gradients itself, and leaves a step with an inf in them out. It asks every
        optimizer this when its step begins, and then says no more if it leaves the step out: what hooks have gathered
        is in doubt until the step is made."""
        scaler = stepping_scaler()
        if scaler is not None:
            if self.adopt() and scaler._per_optimizer_states[id(self)]["stage"] is OptState.UNSCALED:
                raise RuntimeError(
                    "LNGD: got GradScaler.unscale_ before the first step with parameters that fully_shard has put in "
                    "the place of LNGD's, whose gradients it did not see, accepted: fully_shard before LNGD is made"
                )
            for collector in self.core.collectors:
                collector.doubtful = True
        return False

    def _read_scaler(self) -> None:
        """At the start of a step, which is made: learn what its loss was multiplied by, without waiting for it."""
        for collector in self.core.collectors:
            collector.doubtful = False
        scaler, device = stepping_scaler(), self.param_groups[0]["params"][0].device
        self._loss_scale = None if scaler is None else scaler.scale(torch.ones((), device=device))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. If no step was made of these gradients, nothing that was gathered of them is kept."""
        for collector in self.core.collectors:
            collector.drop()
        super().zero_grad(set_to_none)

    def train(self) -> None:
        """Collect statistics of forward passes (the default); `Trainer` calls this before each micro-batch."""
        self._collect(True)

    def eval(self) -> None:
        """Stop collecting, whatever the model does; `Trainer` calls this around evaluation."""
        self._collect(False)

    def _collect(self, enabled: bool) -> None:
        for collector in self.core.collectors:
            collector.collect(enabled)

    def set_batch(self, inputs: Mapping[str, Any]) -> None:
        """Name the batch of the next forward, where the model does not see all of it (labels taken out before):
        ``labels`` [B, T] (−100: ignored), ``attention_mask`` [B, S] and ``decoder_attention_mask`` [B, T] are used."""
        self.core.capture.set_batch(inputs)

    @property
    def needs_fisher_pass(self) -> bool:
        """True in a factor step with ``fisher="true"``: call :meth:`fisher_backward` after the forward."""
        return self.core.capture.needs_fisher_pass and self._is_factor_step()

    def fisher_backward(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """``fisher="true"``: the second backward pass, with labels drawn from softmax(logits). ``.grad`` is untouched.

        Args:
            logits: [..., classes], of the forward just made, before its graph is freed by ``loss.backward()``.
            mask: [...], True (or a label other than −100 made so) where a token counts."""
        self.core.capture.flush()
        with torch.enable_grad():
            self.core.capture.fisher_backward(logits, mask)

    def close(self) -> None:
        """Remove every hook from the model. The optimizer cannot step afterwards without `RuntimeError`."""
        for collector in self.core.collectors:
            collector.close()

    def routing(self) -> list[Route]:
        """What each parameter is assigned to, and why; after the first step also what was found to follow a layer."""
        found, of_layer = [], self.core.capture.topology.of_layer
        for r in self.core.routing.routes:
            known = r.owner == LNGD_OWNER and r.layer in of_layer
            found.append(replace(r, follows=" → ".join(of_layer[r.layer].follows) or "identity") if known else r)
        return found

    def routing_table(self) -> str:
        """The routing as a printable table, and below it what `lr` means in each parameter group."""
        return f"{format_routes(self.routing())}\n\n{format_rates(self.param_groups)}"

    def factors(self, name: str) -> dict[str, Tensor]:
        """The factors of a layer by module name: running averages, start-up bias corrected, undamped.

        ``lngd``: ``phi`` Φ [d, d], ``psi`` Ψ [m] (1/m where φ' = 1). ``kfac``: ``a`` A [d, d], ``b`` B [m, m].
        ``ekfac``: these, their eigenvectors ``basis_a`` and ``basis_b`` in columns, and ``moments`` s, a row for each
        of B's, a column for each of A's. ``tkfac``: ``delta``, ``p`` [d, d], ``q`` [m, m]. ``ng+``: ``left`` [m, m] or
        ``right`` [d, d]. d is the number of columns of the layer's matrix: kernel times channels of a convolution; a
        grouped one has its groups in a first dimension. Where factors are cut into blocks, zeros stand outside these. A
        collective where layers have owners.

        Raises:
            KeyError: no such layer (the names are listed), or no factor step so far.
        """
        layers = self.core.capture.layers
        if name not in layers:
            raise KeyError(f"no LNGD layer '{name}'; there are: {', '.join(layers) or 'none'}")
        if not self.core.batches:
            raise KeyError(f"layer '{name}' has no factors before the first step")
        return self.core.factors(name)

    def memory_usage(self) -> dict[str, int]:
        """Bytes of this rank: ``momentum``, ``factors``, ``inverses``, ``embeddings``, ``fallback``, ``rounding`` (what
        bfloat16 weights lack), ``total``."""
        return state.memory_usage(self.core)

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log; waits for the device, so for logging steps only. Seconds are reset by the call.

        ``failed_inverses``, ``skipped_factors`` and ``skipped_gradients`` count what was passed over since this object
        was made: an inverse that failed, a factor, a gradient (of AdamW: a step of a group) that was not finite. Where
        layers have owners a collective: call it on every rank."""
        result = self.core.diagnostics()
        result["factor_seconds"], self._seconds = self._seconds, 0.0
        return result

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with one more key, ``lngd``, that says what it is of; loadable with ``weights_only=True``.

        Layout *owned*: a collective, and whole on every rank. *rows* (FSDP2): a collective, and as AdamW's is
        made of DTensors."""
        core, own = self.core, self.state
        core.states = own
        self.state = defaultdict(dict, state.save(core))  # type: ignore[arg-type]
        try:
            found = super().state_dict()
        finally:
            self.state = own
        found["lngd"] = state.describe(core)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore bit for bit, dtypes kept. A collective where layers have owners.

        Raises:
            ValueError: another optimizer's state, another version, another model or config; says what differs.
                Nothing is changed then."""
        self.adopt()
        given, core = dict(state_dict), self.core
        described = given.pop("lngd", None)
        if described is not None or not given.get("state"):
            described = state.check_origin(self.config, described)
            state.check_parameters(state.parameters_of(core), described)
        core.states = self.state
        saved, groups = given.get("state", {}), given.get("param_groups", [])
        ids = list(chain.from_iterable(group["params"] for group in groups))
        own = list(chain.from_iterable(group["params"] for group in self.param_groups))
        if len(ids) == len(own):  # else torch says what differs
            by_id = dict(zip(ids, own, strict=True))
            state.load(core, {by_id[i]: value for i, value in saved.items() if i in by_id}, described)
        kept = core.states
        super().load_state_dict({**given, "state": {}})  # which would change dtypes
        self.state = core.states = kept  # type: ignore[assignment]
        self.after_loading()

    def after_loading(self) -> None:
        """Go on from a state that was loaded."""
        for group in self.param_groups:
            group["lr"] = _own_rate(group["lr"])
        self._ranks_agree = False
        self._arm()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError (copy.copy, copy.deepcopy, pickle): a copy would have hooks on the model of the original."""
        raise TypeError(
            "LNGD: got a copy or pickle of the optimizer, which watches one model. Accepted: its state_dict(), loaded "
            "into LNGD(model, …) made of a copy of the model"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, also with parameters of LNGD's own that were taken out of their group. What the group does not
        say is that of its parameters' kind; parameters that LNGD did not find when it was made are AdamW's.

        Raises:
            ValueError: parameters of several kinds in one group, without ``lr_scale`` and ``betas``."""
        if isinstance(param_group, dict) and "params" in param_group:  # else torch says what it takes
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = {"lr": self.defaults["lr"], **param_group, "params": params}
            if hasattr(self, "core"):
                self._complete(param_group)
            param_group["lr"] = _own_rate(param_group["lr"])
        super().add_param_group(param_group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give an added group what it does not say itself."""
        routing = self.core.routing
        kind_of: dict[Any, str] = {
            routing.parameters[r.parameter]: r.kind for r in routing.routes if r.kind is not None
        }
        kinds = sorted({kind_of.get(p, "added") for p in group["params"] if isinstance(p, Tensor)})
        if len(kinds) > 1 and not {"lr_scale", "betas"} <= set(group):
            raise ValueError(
                f"param_groups: got parameters of the kinds {', '.join(kinds)} in one group, accepted: one kind a "
                "group, or lr_scale and betas given"
            )
        kind = kinds[0] if len(kinds) == 1 else "added"
        for key, value in {"name": kind, **options_of(kind, self.config, group["lr"])}.items():
            group.setdefault(key, value)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """What this process has of a gradient; zeros where there is none."""
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)


def _own_rate(lr: float | Tensor) -> float | Tensor:
    """A rate that is a tensor is each group's own: what changes rates in place does so group by group."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def _share(lr: float | Tensor, own: float | Tensor) -> float | Tensor:
    """By what a bias's column in its layer's update is multiplied to be at its own rate. Where the layer's rate is 0
    there is no update that this could be a share of: the column is left as it is."""
    if isinstance(lr, Tensor):
        return torch.where(lr > 0, own / lr, 1.0)
    return own / lr if lr else 1.0
