"""g² of a layer: where the squared gradients with respect to the pre-activation come from.

``expected`` and ``sampled`` use the layer's own predictive distribution N(φ(s), I): g = −φ'(s) ⊙ ε. They need the
forward pass only. ``empirical`` and ``true`` use gradients of a loss and keep each layer's input until these are there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..checks import GRADIENT_FISHERS
from .family_sums import FamilySums
from .layers import Layer
from .sums import GroupSums


@dataclass
class Call:
    """One call of a layer, as far as it is summed.

    Attributes:
        a: the layer's input, detached; only the rows of the batch that count.
        mask: [N], 1 where a position counts, or None.
        rows: which rows of the batch those are.
    """

    sums: GroupSums | FamilySums
    layer: Layer
    a: Tensor
    mask: Tensor | None
    rows: slice
    most: int

    def add(self, g2: Tensor | None) -> None:
        """Add the call to the sums: g2 [units, N, m], or None where it is 1. LNGD's alone."""
        assert isinstance(self.sums, GroupSums)
        for a, where in self.layer.inputs(self.a, self.most):
            part = None if g2 is None else g2[:, where]
            self.sums.add(a, part, None if self.mask is None else self.mask[where])

    def add_gradient(self, g: Tensor) -> None:
        """Add the call to the sums with the gradients of a loss: g [units, N, m]."""
        rows = self.a.shape[0] if self.a.dim() > 1 else 1
        per_row = max(1, g.shape[1] // max(1, rows))
        for a, where in self.layer.inputs(self.a, self.most):
            self.sums.add_gradient(a, g[:, where], None if self.mask is None else self.mask[where], per_row)

    def chosen(self, output: Tensor) -> Tensor:
        """[units, N, m]: a tensor of the output's shape, the rows that count."""
        return self.layer.outputs(self.layer.batched(output)[self.rows])


# The edge stands for the output as it was: an activation may have worked in place since.
Observation = tuple[Call, GradientEdge, torch.Size]


def origin(output: Tensor) -> Tensor:
    """The tensor to watch for the gradient of a layer's output.

    A linear layer's output is a view where its input has three dimensions or more. Work on a view in place takes a hook
    on it out of the graph, not one on what it is a view of.
    """
    base = output._base if output._is_view() else None
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if base is not None and whole and base.requires_grad else output


class FisherSource:
    """Turns calls of layers into sums, by one of the four Fishers.

    Args:
        kind: expected, sampled, true or empirical.
        seed: of the draws of ``sampled`` and ``true``.
        others: the other kinds that could be asked for, told in errors.
    """

    def __init__(self, kind: str, seed: int, others: tuple[str, ...]) -> None:
        self.kind = kind
        self.others = others
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._stream = seed
        self.in_pass = False  # the second backward pass runs: its gradients are not those of the loss
        self.reset()

    @property
    def differs_by_layer(self) -> bool:
        """True where two layers with one input still have unlike Φ, so that nothing can be shared."""
        return self.kind != "expected"

    @property
    def uses_gradients(self) -> bool:
        """True where g² is of a loss's gradients: calls must be taken in when they are made."""
        return self.kind in GRADIENT_FISHERS

    def reset(self) -> None:
        """Forget the calls that wait for their gradients."""
        self._waiting: list[Observation] = []
        self.hidden: set[str] = set()  # layers whose outputs had no graph, as within a reentrant checkpoint
        self.sampled_terms: Tensor | int = 0

    @property
    def waiting(self) -> bool:
        """True while calls wait for :meth:`backward`."""
        return bool(self._waiting)

    def observe(self, call: Call, output: Tensor, slope: Tensor | None) -> None:
        """Take in one call of a layer: its output, and φ' of what follows in the same shape (None: 1)."""
        output_shape = output.shape
        if self.uses_gradients and not output.requires_grad:
            self.hidden.add(call.layer.name)
        if self.kind == "empirical":
            if output.requires_grad:
                weight = accumulator(call.layer.live_weight)

                def receive(g: Tensor | None) -> None:
                    if g is not None and runs(weight):
                        _add_gradient(call, g.view(output_shape))

                origin(output).register_hook(receive)
            return
        if self.kind == "true":
            if output.requires_grad:
                self._waiting.append((call, get_gradient_edge(origin(output)), output_shape))
            return
        with torch.no_grad():
            g2 = None if slope is None else _at_least_float(call.chosen(slope)).square()
            if self.kind == "sampled":
                shape = call.chosen(output).shape
                dtype = torch.promote_types(output.dtype, torch.float32)
                draw = self.generator(output.device)
                noise = torch.randn(*shape, dtype=dtype, device=output.device, generator=draw).square_()
                g2 = noise if g2 is None else g2 * noise
            call.add(g2)

    def observe_head(self, call: Call, logits: Tensor, independent: bool) -> None:
        """Take in the head, whose predictive distribution is the model's own: E[g²] = p(1 − p).

        Args:
            logits: [..., classes].
            independent: each class is a yes or no of its own (multi-label), else one of them is true.
        """
        with torch.no_grad():
            scores = _at_least_float(call.chosen(logits))
            p = scores.sigmoid() if independent else scores.softmax(-1)
            call.add(p * (1 - p))

    def backward(self, logits: Tensor, mask: Tensor | None) -> None:
        """``true``: draw a label a row from softmax(logits), and take in the gradients of their log-likelihood.

        Args:
            logits: [..., classes], with the graph of the forward pass that was observed; it is kept.
            mask: [...], True where a row counts.
        """
        if waits_for_first_backward(logits):
            raise RuntimeError(
                "fisher: 'true' makes a backward pass before the loss's own, which DDP(static_graph=True) takes for "
                f"it: gradients would not be reduced. Use static_graph=False; or accepted: {', '.join(self.others)}"
            )
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        flat = logits.reshape(-1, logits.shape[-1]).float()
        with torch.no_grad():
            p = flat.softmax(-1)
            p = torch.where(p.isfinite().all(-1, keepdim=True), p, 1.0)  # NaN logits: the draw may not fail, Φ will
            labels = torch.multinomial(p, 1, generator=self.generator(flat.device)).squeeze(-1)
        losses = torch.nn.functional.cross_entropy(flat, labels, reduction="none")
        if mask is not None:
            losses = losses * mask.reshape(-1).to(losses.dtype)
            self.sampled_terms = self.sampled_terms + (mask != 0).sum()
        else:
            self.sampled_terms = self.sampled_terms + labels.shape[0]
        edges = [edge for _, edge, _ in waiting]
        self.in_pass = True
        try:
            gradients = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
        finally:
            self.in_pass = False
        for (call, _, shape), g in zip(waiting, gradients, strict=True):
            if g is not None:
                _add_gradient(call, g.view(shape))

    def check_terms(self, terms: Tensor | int) -> None:
        """Raise RuntimeError where ``empirical`` cannot know over how many terms the loss is a mean."""
        if self.kind == "empirical" and isinstance(terms, int) and terms == 0:
            raise RuntimeError(
                "fisher: 'empirical' needs the size of the batch, and the model's arguments hold no tensor; name "
                f"them with optimizer.set_batch(inputs) before each forward, or accepted: {', '.join(self.others)}"
            )

    def scale(
        self, terms: Tensor | int, sampled_terms: Tensor | int, ranks: int, loss_scale: Tensor | None = None
    ) -> Tensor | float | None:
        """What the sums are multiplied by to become Φ; None: one over the number of positions.

        With g the gradient of the mean over T terms, the Fisher block is (1/T) Σ (T g)(T g)ᵀ = T Σ g gᵀ; with g
        the gradient of the sum over T drawn labels it is (1/T) Σ g gᵀ. Over W ranks the loss is the mean of theirs,
        and the g of a rank's own loss is W times that of the loss: T/W² Σ g gᵀ.

        Args:
            terms, sampled_terms: T, of the loss and of the drawn labels, of all ranks.
            ranks: W.
            loss_scale: what the loss was multiplied by, and with it every g of ``empirical``; None: one.
        """
        if self.kind == "empirical":
            return unscaled(terms if ranks == 1 else terms / ranks**2, loss_scale)
        if self.kind == "true":
            return 1.0 / (sampled_terms if isinstance(sampled_terms, Tensor) else max(sampled_terms, 1))
        return None

    def restart(self, rank: int, step: int) -> None:
        """Draw from a stream that belongs to this rank and step: with many ranks no one state says where all are."""
        self._stream = seed_of(self.seed, rank, step)
        self._generators.clear()

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of this device: never the user's."""
        if device not in self._generators:
            self._generators[device] = generator_for(device, self._stream)
        return self._generators[device]

    def state(self) -> dict[str, Tensor]:
        """Generator states by device, for a checkpoint."""
        return {str(device): generator.get_state() for device, generator in self._generators.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`; devices that this process lacks are left out."""
        self._generators = generators_of(state)


def seed_of(*parts: int | str) -> int:
    """The seed of a stream of draws that belongs to these alone."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def unscaled(factor: Tensor | float, loss_scale: Tensor | None) -> Tensor | float:
    """A factor of sums of products of two gradients, for those of a loss that was multiplied by `loss_scale`."""
    return factor if loss_scale is None else factor / loss_scale.square()


def generator_for(device: torch.device, seed: int) -> torch.Generator:
    """A generator for draws on a device. The meta device has none and draws nothing: it takes one of the CPU's."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def generators_of(state: dict[str, Tensor]) -> dict[torch.device, torch.Generator]:
    """The generators of a saved state, those of this process's devices. RuntimeError or TypeError if it is damaged."""
    generators = {}
    for name, value in state.items():
        device = torch.device(name)
        try:
            generator = torch.Generator(device)
        except RuntimeError:  # no such device here
            continue
        generators[device] = generator.set_state(value.cpu())
    return generators


def waits_for_first_backward(output: Tensor) -> bool:
    """Whether this comes out of a DDP with a static graph, whose first backward pass starts its reduction."""
    node, steps = output.grad_fn, 0
    while node is not None and steps < 16:  # the model's output, or little made of it
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None:
            return bool(wrapper().static_graph)
        node, steps = (node.next_functions[0][0] if node.next_functions else None), steps + 1
    return False


def _add_gradient(call: Call, g: Tensor) -> None:
    with torch.no_grad():
        call.add_gradient(_at_least_float(call.chosen(g.detach())))


def _at_least_float(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def accumulator(parameter: Tensor) -> Any:
    """The node of the graph that accumulates this parameter's gradient; None: it wants none. To be asked for in the
    forward pass: FSDP2 puts another parameter in its place afterwards."""
    with torch.enable_grad():
        function = parameter.view_as(parameter).grad_fn
    return None if function is None else function.next_functions[0][0]


def runs(node: Any) -> bool:
    """Whether the backward pass that runs goes to such a node: `torch.autograd.grad` only looks."""
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad asks for this very parameter
        return True
