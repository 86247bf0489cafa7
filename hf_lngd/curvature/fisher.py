"""g² of a layer: where the squared gradients with respect to the pre-activation come from.

``expected`` and ``sampled`` use the layer's own predictive distribution N(φ(s), I): g = −φ'(s) ⊙ ε. They need the
forward pass only. ``empirical`` and ``true`` use gradients of a loss and keep each layer's input until these are there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .layers import Layer, activation_derivative
from .sums import GroupSums

# The edge stands for the output as it was: an activation may have worked in place since.
Observation = tuple[GroupSums, Layer, Tensor, GradientEdge, Tensor | None]


class FisherSource:
    """Turns calls of layers into sums, by one of the four Fishers.

    Args:
        kind: expected, sampled, true or empirical.
        seed: of the draws of ``sampled`` and ``true``.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self.in_pass = False  # the second backward pass runs: its gradients are not those of the loss
        self.reset()

    @property
    def differs_by_layer(self) -> bool:
        """True where two layers with one input still have unlike Φ, so that nothing can be shared."""
        return self.kind != "expected"

    @property
    def uses_gradients(self) -> bool:
        """True where g² is of a loss's gradients: calls must be taken in when they are made."""
        return self.kind in ("true", "empirical")

    def reset(self) -> None:
        """Forget the calls that wait for their gradients."""
        self._waiting: list[Observation] = []
        self.sampled_terms: Tensor | int = 0

    @property
    def waiting(self) -> bool:
        """True while calls wait for :meth:`backward`."""
        return bool(self._waiting)

    def observe(
        self,
        sums: GroupSums,
        layer: Layer,
        a: Tensor,
        output: Tensor,
        mask: Tensor | None,
        activation: nn.Module | None,
    ) -> None:
        """Take in one call of a layer: a [..., d], output [..., m], mask [N]."""
        if self.kind == "empirical":
            if output.requires_grad:
                inputs = a.detach()
                output.register_hook(lambda g: _add_gradient(sums, layer, inputs, g, mask))
            return
        if self.kind == "true":
            if output.requires_grad:
                self._waiting.append((sums, layer, a.detach(), get_gradient_edge(output), mask))
            return
        with torch.no_grad():
            derivative = None if activation is None else activation_derivative(activation, output)
            g2 = None if derivative is None else derivative.square()
            inputs = layer.inputs(a)
            if self.kind == "sampled":
                noise = torch.randn(
                    inputs.shape[0], layer.out_features, dtype=inputs.dtype, device=inputs.device,
                    generator=self.generator(inputs.device),
                )  # fmt: skip
                g2 = noise.square_() if g2 is None else g2 * noise.square_()
            sums.add(inputs, g2, mask)

    def backward(self, logits: Tensor, mask: Tensor | None) -> None:
        """``true``: draw a label a row from softmax(logits), and take in the gradients of their log-likelihood.

        Args:
            logits: [..., classes], with the graph of the forward pass that was observed; it is kept.
            mask: [...], True where a row counts.
        """
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
        edges = [edge for _, _, _, edge, _ in waiting]
        self.in_pass = True
        try:
            gradients = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
        finally:
            self.in_pass = False
        for (sums, layer, a, _, position_mask), g in zip(waiting, gradients, strict=True):
            if g is not None:
                _add_gradient(sums, layer, a, g, position_mask)

    def scale(self, terms: Tensor | int) -> Tensor | float | None:
        """What the sums are multiplied by to become Φ; None: one over the number of positions.

        With g the gradient of the mean over T terms, the Fisher block is (1/T) Σ (T g)(T g)ᵀ = T Σ g gᵀ; with g
        the gradient of the sum over T drawn labels it is (1/T) Σ g gᵀ.
        """
        if self.kind == "empirical":
            return terms
        if self.kind == "true":
            terms = self.sampled_terms
            return 1.0 / (terms if isinstance(terms, Tensor) else max(terms, 1))
        return None

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of this device: never the user's."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def state(self) -> dict[str, Tensor]:
        """Generator states by device, for a checkpoint."""
        return {str(device): generator.get_state() for device, generator in self._generators.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`; devices that this process lacks are left out."""
        self._generators = generators_of(state)


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


def _add_gradient(sums: GroupSums, layer: Layer, a: Tensor, g: Tensor, mask: Tensor | None) -> None:
    with torch.no_grad():
        inputs = layer.inputs(a)
        sums.add(inputs, g.detach().reshape(-1, g.shape[-1]).to(inputs.dtype).square(), mask)
