"""Hooks of the paper's Fishers: φ' of what follows a layer, gradients of a loss, rows for the adaptive rate.

``expected`` and ``sampled`` use the layer's own predictive distribution N(φ(s), I): g = −φ'(s) ⊙ ε. They need the
forward pass only. ``empirical`` and ``true`` use gradients of a loss and keep each layer's input until these are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ..capture import Call, Capture, Expected
from ..config import GRADIENT_FISHERS, LNGDConfig, other_fishers
from ..layers import Layer
from ..linalg import index_tensor, state_dtype
from ..statistics import Statistics
from ..topology import Group
from ..torch_internals import Hook, call_input, in_backward, origin
from .chains import Chain, ChainWatch, is_elementwise
from .families import new_statistics
from .rate import RowSamples, rows_read, unscaled


@dataclass
class Observation:
    """One call of a layer, as far as it is summed: input, mask, which samples of the batch."""

    layer: Layer
    a: Tensor
    mask: Tensor | None
    samples: slice

    def _mask(self, where: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[where]

    def add(self, statistics: Any, g2: Tensor | None) -> None:
        """Add the call with g² [units, N, m], or None where it is 1."""
        for a, where in self.layer.inputs(self.a):
            statistics.add(a, self._mask(where), *([] if g2 is None else [g2[:, where]]))

    @torch.no_grad()
    def add_gradient(self, statistics: Any, g: Tensor) -> None:
        """Add the call with the gradients of a loss, in the shape of the output."""
        g = at_least_float(self.chosen(g.detach()))
        samples = self.a.shape[0] if self.a.dim() > 1 else 1
        for a, where in self.layer.inputs(self.a):
            per_sample = max(1, g.shape[1] // max(1, samples))
            statistics.add_gradient(a, g[:, where], self._mask(where), per_sample)

    def chosen(self, output: Tensor) -> Tensor:
        """[units, N, m]: a tensor of the output's shape, the samples that count."""
        return self.layer.outputs(self.layer.batched(output)[self.samples])


@dataclass
class Rows:
    """Of a call's rows those that the adaptive rate reads: their numbers and inputs, for how many each stands, and how
    many the call has."""

    index: Tensor
    a: Tensor
    weights: Tensor
    count: int


@dataclass
class Note:
    """What is kept of a call until its gradient comes: what will be summed with it; rows for the adaptive rate."""

    seen: Observation | None = None
    rows: Rows | None = None


class PaperCapture(Capture):
    """Capture with the paper's Fishers and what its adaptive rate needs. `samples`: layer → inputs and gradients of the
    batch's rows (``rate=adaptive``)."""

    convolution_samples = 1

    def __init__(self, model: nn.Module, layers: list[Layer], config: LNGDConfig) -> None:
        self.kind = config.fisher
        self.uses_gradients = self.kind in GRADIENT_FISHERS
        self.shares = self.kind == "expected"
        self._keeps_rows = config.rate == "adaptive"
        self._watch = ChainWatch()
        self._watching = False
        self._generators: dict[torch.device, torch.Generator] = {}
        super().__init__(model, layers, config)

    @property
    def needs_fisher_pass(self) -> bool:  # type: ignore[override]
        """``true``: a second backward pass is needed in factor steps."""
        return self.kind == "true"

    def wants_hooks(self, factors: bool) -> bool:
        return factors or self._keeps_rows

    def forget(self) -> None:
        super().forget()
        self.samples: dict[str, RowSamples] = {}
        self._starts: dict[str, dict[Any, int]] = {}
        self._counts: dict[str, int] = {}
        self._waiting: list[tuple[Expected, GradientEdge, torch.Size]] = []
        self._drawn: Tensor | int = 0
        self._unfinished: set[Chain] = set()
        self._generators = {}

    def module_hooks(self, module: nn.Module) -> Iterator[RemovableHandle]:
        if is_elementwise(module) and not self.uses_gradients:
            yield module.register_forward_pre_hook(Hook(self._before_activation), with_kwargs=True)
            yield module.register_forward_hook(Hook(self._after_activation))

    def _before_activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_collecting():
            self._watch.enter_module(module, call_input(args, kwargs))

    def _after_activation(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_collecting():
            self._watch.leave_module(output)

    def disarm(self) -> None:
        self._stop_watching()
        self._watch.clear()
        super().disarm()

    def forward_begins(self) -> None:
        if self.armed and not self.uses_gradients:
            self._watching = True
            self._watch.__enter__()

    def forward_ends(self, finished: bool) -> None:
        self._stop_watching()
        super().forward_ends(finished)
        if not finished:
            self._unfinished = set()
            self._watch.clear()

    def _stop_watching(self) -> None:
        """Leave the function mode; also after an interrupt, which no hook sees."""
        if self._watching:
            self._watching = False
            self._watch.remove()

    def layer_called(self, call: Call) -> None:
        """As of `Capture`; rows are kept, and what follows a layer is waited for."""
        call.expected.note = Note(rows=self._rows(call) if self._keeps_rows else None)
        if self.kind == "true" and call.output.requires_grad:  # of the output as it is now
            call.note = get_gradient_edge(origin(call.output)), call.output.shape
        if not self.uses_gradients and in_backward() and not self._inside:
            return  # recomputed by somebody's own checkpoint function: what follows cannot be seen
        name = call.layer.name
        group = self.topology.of_layer.get(name)
        if not self.armed or self.uses_gradients or group is None or not group.follows:
            super().layer_called(call)
            return
        call.group = group

        def done(chain: Chain) -> None:
            self._unfinished.discard(chain)
            call.note = chain
            self.observe(call)

        if not self._inside:  # parts of the model called by themselves: hold no more than one call of each
            for chain in [chain for chain in self._unfinished if chain.owner == name]:
                chain.finish()
                self._watch.drop(chain)
        chain = Chain(group.follows, done, name)
        self._unfinished.add(chain)
        self._watch.follow(call.output, chain)

    def held(self, call: Call) -> None:
        if not self.uses_gradients:
            call.note = Chain(None)
            self._watch.follow(call.output, call.note)

    def flush(self) -> None:
        for chain in list(self._unfinished):
            chain.finish()
        self._watch.clear()
        super().flush()

    def follows(self, call: Call) -> tuple[str, ...]:
        return call.note.names() if isinstance(call.note, Chain) else ()

    def observe(self, call: Call) -> None:
        found = self.select(call)
        if found is None:
            return
        statistics, a, mask, samples = found
        seen, output = Observation(call.layer, a, mask, samples), call.output
        if self.uses_gradients:
            call.expected.note.seen = seen
            if call.note is not None:
                self._waiting.append((call.expected, *call.note))
            return
        follows, slope = call.group.follows, None  # type: ignore[union-attr]
        if follows:
            chain = call.note
            # a call that was held may be another of the layer's, without these links behind it
            counts = isinstance(chain, Chain) and (chain.expected is not None or chain.names() == follows)
            slope = chain.slope() if counts else None
            slope = torch.ones_like(output) if slope is None else slope
        with torch.no_grad():
            g2 = None if slope is None else at_least_float(seen.chosen(slope)).square()
            if self.kind == "sampled":
                draw, dtype = self._generator(output.device), state_dtype(output.dtype)
                noise = torch.randn(
                    *seen.chosen(output).shape, dtype=dtype, device=output.device, generator=draw
                ).square_()
                g2 = noise if g2 is None else g2 * noise
            seen.add(statistics, g2)

    def taken(self, expected: Expected, gradient: Tensor) -> None:
        super().taken(expected, gradient)
        note = expected.note
        if self.kind == "empirical" and note.seen is not None:
            note.seen.add_gradient(self.total(expected.sums.group), gradient)  # type: ignore[union-attr]
        if note.rows is not None:
            own = self.samples.setdefault(expected.layer.name, RowSamples())
            g = as_rows(expected.layer, gradient)[note.rows.index]
            own.add(expected.forward, note.rows.a, g, note.rows.weights, note.rows.count)

    def _rows(self, call: Call) -> Rows:
        name, a = call.layer.name, as_rows(call.layer, call.a)
        start = self._starts.setdefault(name, {}).setdefault(call.expected.forward, self._counts.get(name, 0))
        self._counts[name] = start + len(a)
        rows, weights = (index_tensor(found, a.device) for found in rows_read(start, len(a)))
        return Rows(rows, a[rows], weights, len(a))

    def new_statistics(self, group: Group) -> Statistics:
        bank = self.coming.bank_of.get(group.name)
        basis = None if bank is None else bank.basis_of(group.name)
        return new_statistics(self.layers[group.name], group, self.config, basis)

    def fisher_backward(self, logits: Tensor, mask: Tensor | None) -> None:
        """``true``: draw a label a row from softmax(logits) [..., classes], with the graph of the forward pass that was
        seen (it is kept), and take in the gradients of their log-likelihood. `mask` [...]: True where a row counts."""
        if _waits_for_first_backward(logits):
            raise RuntimeError(
                "fisher: 'true' makes a backward pass before the loss's own, which DDP(static_graph=True) takes for "
                f"it: gradients would not be reduced. Use static_graph=False; or accepted: {other_fishers(self.config)}"
            )
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self.begin_anew_if_dropped()
        flat = logits.reshape(-1, logits.shape[-1]).float()
        with torch.no_grad():
            p = flat.softmax(-1)
            p = torch.where(p.isfinite().all(-1, keepdim=True), p, 1.0)  # NaN logits: the draw may not fail, Φ will
            labels = torch.multinomial(p, 1, generator=self._generator(flat.device)).squeeze(-1)
        losses = torch.nn.functional.cross_entropy(flat, labels, reduction="none")
        if mask is not None:
            losses = losses * mask.reshape(-1).to(losses.dtype)
        self._drawn = self._drawn + (labels.shape[0] if mask is None else (mask != 0).sum())
        edges = [edge for _, edge, _ in waiting]
        gradients = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
        for (expected, _, shape), g in zip(waiting, gradients, strict=True):
            if g is not None:
                expected.note.seen.add_gradient(self.total(expected.sums.group), g.view(shape))  # type: ignore[union-attr]

    def scalars(self) -> list[Tensor | int]:
        return [self.terms, self._drawn]

    def scale(self, scalars: list[Tensor], size: int, loss_scale: Tensor | None) -> Tensor | float | None:
        """What sums are multiplied by to become factors; None: one over the number of tokens.

        With g the gradient of the mean over T terms, the Fisher block is (1/T) Σ (T g)(T g)ᵀ = T Σ g gᵀ; with g
        the gradient of the sum over T drawn labels it is (1/T) Σ g gᵀ. Over W ranks the loss is the mean of theirs,
        and the g of a rank's own loss is W times that of the loss: T/W² Σ g gᵀ."""
        terms, drawn = scalars
        if self.kind == "empirical":
            return unscaled(terms if size == 1 else terms / size**2, loss_scale)
        return 1.0 / drawn.clamp_min(1) if self.kind == "true" else None

    def _generator(self, device: torch.device) -> torch.Generator:
        """Never the user's: a stream that belongs to the seed, this rank and step, so that no state has to be kept.
        The meta device has none and draws nothing: it takes one of the CPU's."""
        if device not in self._generators:
            text = f"{self.config.seed} {self.coming.rank} {self.coming.step}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
            self._generators[device] = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
        return self._generators[device]

    def check_gradients(self) -> None:
        """The adaptive rate: Eq. 12-13 without curvature is a rate of about 1/μ."""
        if not self._keeps_rows or (self.samples_seen and self.coming.size > 1):  # another rank may have called a layer
            return
        gradients = {n: y.weight.grad for n, y in self.layers.items() if y.weight.grad is not None}
        known = self.samples_seen > 0  # or the batch is empty, and so is what its layers saw
        own = self.samples
        unseen = [n for n in gradients if n not in own or not (known or own[n].seen == 0)]
        # zeros alone: a step that makes the state, as torch.distributed.checkpoint makes one
        if unseen and any(bool(gradient.any()) for gradient in gradients.values()):
            raise RuntimeError(
                f"rate: 'adaptive' saw no gradients of {', '.join(unseen[:3])} in this step. Call the model that was "
                "given to LNGD itself, on tensors, in each step, without optimizer.eval(); or accepted: rms, none"
            )

    def check(self) -> None:
        """As of `Capture`, and for what ``fisher`` needs."""
        others = other_fishers(self.config)
        if self.kind == "true" and self._waiting:
            raise RuntimeError(
                "fisher: 'true' needs optimizer.fisher_backward(logits) after each forward of a factor step "
                f"(optimizer.needs_fisher_pass is True in one), or accepted: {others}"
            )
        super().check()
        if self.kind == "empirical" and self.statistics and isinstance(self.terms, int) and self.terms == 0:
            raise RuntimeError(
                "fisher: 'empirical' needs the size of the batch, and the model's arguments hold no tensor; name "
                f"them with optimizer.set_batch(inputs) before each forward, or accepted: {others}"
            )


def as_rows(layer: Layer, x: Tensor) -> Tensor:
    """A call's input or output with its batch dimension, detached; one token is one row."""
    x = layer.batched(x.detach())
    return x if x.dim() > 1 else x.unsqueeze(0)


def at_least_float(value: Tensor) -> Tensor:
    """The value in at least float32."""
    return value.to(state_dtype(value.dtype))


def _waits_for_first_backward(output: Tensor) -> bool:
    """Whether this comes out of a DDP with a static graph, whose first backward pass starts its reduction."""
    node = output.grad_fn
    for _ in range(16):  # the model's output, or little made of it
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None:
            return bool(wrapper().static_graph)
        if node is None or not node.next_functions:
            return False
        node = node.next_functions[0][0]
    return False
