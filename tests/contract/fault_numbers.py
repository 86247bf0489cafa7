"""Rows: numbers that are not finite, too large, too small, and matrices that have no inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.contract.fault_table import ALL, DIRECTIONS, FAMILIES, Scene, fault

GRADIENTS, ACTIVATIONS, FACTORS = "Gradients and losses", "Activations", "Factors and their inverses"
ZERO = "the layer's gradient counts as zero in this step: momentum goes on, factors are taken as ever"
NAN, INF = float("nan"), float("inf")


def spoiled_gradient(scene: Scene, name: str, value: float, **fields: Any) -> dict[str, Tensor]:
    """A step with this value somewhere in the gradient of a parameter; the weights before it."""
    scene.make(**fields)
    scene.backward()
    before = scene.weights()
    dict(scene.model.named_parameters())[name].grad.flatten()[0] = value
    scene.finish()
    return before


def gradient_rows() -> None:
    for text, value in (("NaN", NAN), ("infinity", INF), ("1e30 (its square overflows)", 1e30)):

        @fault(GRADIENTS, f"{text} in the gradient of a layer", ZERO, counts=("skipped_gradients",), variants=ALL)
        def layer(scene: Scene, value: float = value) -> None:
            before = spoiled_gradient(scene, "up.weight", value)
            assert not torch.equal(before["down.weight"], scene.model.down.weight)

        @fault(GRADIENTS, f"{text} in the gradient of a bias",
               "AdamW leaves out this step of the parameter group: weights and moments stay",
               counts=("skipped_gradients",))  # fmt: skip
        def bias(scene: Scene, value: float = value) -> None:
            before = spoiled_gradient(scene, "up.bias", value)
            assert torch.equal(before["up.bias"], scene.model.up.bias)
            assert torch.equal(before["norm.bias"], scene.model.norm.bias)
            assert not torch.equal(before["up.weight"], scene.model.up.weight)

        @fault(GRADIENTS, f"{text} in the gradient of an embedding",
               "the table's gradient counts as zero in this step (with `embedding=fallback` AdamW leaves the step out)",
               counts=("skipped_gradients",), variants=({"embedding": "exact"}, {"embedding": "fallback"}))  # fmt: skip
        def embedding(scene: Scene, value: float = value) -> None:
            spoiled_gradient(scene, "embed.weight", value)


gradient_rows()


@fault(GRADIENTS, "gradients of 1e-42 (denormal)", "a step as ever", variants=ALL)
def tiny_gradients(scene: Scene) -> None:
    scene.make()
    scene.step(scale=1e-42)


@fault(GRADIENTS, "gradients that are zero", "momentum moves the weights", variants=ALL)
def zero_gradients(scene: Scene) -> None:
    scene.make()
    scene.step(scale=0.0)


for _text, _counts, _variants in (
    ("", (), ({}, {"direction": "natural"}, {"preset": "paper"})),
    (" (factors are made of them)", ("failed_inverses",), FAMILIES),
):

    @fault(GRADIENTS, f"gradients that are zero from the first step on{_text}",
           "weights move by decay alone" + ("; what has no inverse stays the identity" if _counts else ""),
           counts=_counts, variants=_variants)  # fmt: skip
    def zero_from_the_start(scene: Scene) -> None:
        scene.make(steps=0)
        before = scene.weights()
        scene.step(scale=0.0)
        torch.testing.assert_close(scene.model.up.weight, before["up.weight"], rtol=2e-2, atol=0)


for _text, _value in (("NaN", NAN), ("infinity", INF)):

    @fault(GRADIENTS, f"a loss of {_text}, all gradients with it",
           "all gradients count as zero, AdamW leaves the step out, factors (but those of gradients) are taken as ever",
           counts=("skipped_gradients",), variants=(*DIRECTIONS, {"preset": "paper"}))  # fmt: skip
    def bad_loss(scene: Scene, value: float = _value) -> None:
        scene.make()
        phi = scene.phi("up")
        scene.step(scale=value)
        assert not torch.equal(phi, scene.phi("up"))

    @fault(GRADIENTS, f"a loss of {_text} where factors are made of gradients",
           "all gradients count as zero, and the factors of this step are left out",
           counts=("skipped_factors", "skipped_gradients"),
           variants=({"family": "kfac"}, {"family": "ekfac"}, {"family": "ng+"}, {"fisher": "empirical"}))  # fmt: skip
    def bad_loss_in_factors(scene: Scene, value: float = _value) -> None:
        scene.make()
        phi = scene.phi("down")
        scene.step(scale=value)
        assert torch.equal(phi, scene.phi("down"))


@fault(GRADIENTS, "a loss of NaN whose step the loop leaves out",
       "nothing of it is counted once the gradients are dropped", variants=({}, {"preset": "paper"}))  # fmt: skip
def thrown_away(scene: Scene) -> None:
    found = []
    for dropped in (False, True):
        scene.seed = 0
        scene.make(fisher="expected")
        if dropped:
            scene.backward(scene.batch(9), NAN)
            scene.optimizer.zero_grad()
        scene.backward({"ids": torch.arange(12).view(4, 3)})
        scene.finish()
        found.append(scene.phi("up"))
    assert torch.equal(*found)


def spoils_one(value: float) -> Callable[[Tensor], Tensor]:
    """Puts a value in the place of the first number of what a layer reads."""

    def put(h: Tensor) -> Tensor:
        mask = torch.zeros_like(h, dtype=torch.bool)
        mask.view(-1)[0] = True
        return h.masked_fill(mask, value)

    return put


def spoil_once(scene: Scene, change: Callable[[Tensor], Tensor], **fields: Any) -> Tensor:
    """A step in which the first layer reads something else; its factor before."""
    scene.make(**fields)
    phi = scene.phi("up")
    scene.model.spoil = change
    scene.step()
    scene.model.spoil = None
    return phi


for _text, _value in (("NaN", NAN), ("infinity", INF)):

    @fault(ACTIVATIONS, f"{_text} in what a layer reads",
           "its factor of this step is left out, gradients count as zero",
           counts=("skipped_factors", "skipped_gradients"), variants=ALL)  # fmt: skip
    def bad_activation(scene: Scene, value: float = _value) -> None:
        assert torch.equal(spoil_once(scene, spoils_one(value)), scene.phi("up"))


@fault(ACTIVATIONS, "NaN in a forward pass whose loss is thrown away, then a good one", "a step as ever",
       variants=DIRECTIONS)  # fmt: skip
def thrown_forward(scene: Scene) -> None:
    scene.make()
    phi = scene.phi("up")
    scene.model.spoil = lambda h: h * NAN
    scene.model(**scene.batch())
    scene.model.spoil = None
    scene.step()
    assert not torch.equal(phi, scene.phi("up"))


@fault(ACTIVATIONS, "1e30 (its square overflows) in what a layer reads", "its factor of this step is left out",
       counts=("skipped_factors",), variants=DIRECTIONS)  # fmt: skip
def huge(scene: Scene) -> None:
    assert torch.equal(spoil_once(scene, spoils_one(1e30)), scene.phi("up"))


@fault(ACTIVATIONS, "activations of 1e-30, whose squares vanish", "a step as ever", variants=ALL)
def tiny(scene: Scene) -> None:
    spoil_once(scene, lambda h: h * 1e-30)


def first_reads(scene: Scene, change: Callable[[Tensor], Tensor], **fields: Any) -> None:
    scene.make(steps=0, bias="fallback", **fields)
    scene.model.spoil = change
    scene.step()
    scene.model.spoil = None


NO_INVERSE = "relative damping is zero with it: what cannot be inverted stays the identity, or what it was"


@fault(ACTIVATIONS, "activations of 1e-30 from the first step on", NO_INVERSE, counts=("failed_inverses",),
       variants=(*DIRECTIONS, *FAMILIES))  # fmt: skip
def tiny_from_the_start(scene: Scene) -> None:
    first_reads(scene, lambda h: h * 1e-30)


@fault(FACTORS, "a factor of zeros", NO_INVERSE, counts=("failed_inverses",), variants=(*DIRECTIONS, *FAMILIES))
def zero_factor(scene: Scene) -> None:
    first_reads(scene, torch.zeros_like)


@fault(FACTORS, "a factor of zeros under `damping=paper`", "damping is at least ν1: a finite inverse",
       variants=({"preset": "paper"}, {"damping": "paper", "direction": "natural"}))  # fmt: skip
def zero_factor_of_the_paper(scene: Scene) -> None:
    first_reads(scene, torch.zeros_like)
    assert not scene.phi("up").any()


@fault(FACTORS, "a factor of rank one", "damping gives a finite inverse", variants=ALL)
def rank_one(scene: Scene) -> None:
    first_reads(scene, lambda h: h * 0 + torch.arange(1.0, 7.0))
    found = scene.optimizer.factors("up")
    assert torch.linalg.matrix_rank(found.get("p", found.get("a", found.get("phi", found.get("right"))))) == 1


@fault(FACTORS, "a singular factor: two inputs are the same, one is always zero", "damping gives a finite inverse",
       variants=ALL)  # fmt: skip
def singular(scene: Scene) -> None:
    spoil_once(scene, lambda h: torch.cat((h[..., :1], h[..., :1], h[..., 2:3] * 0, h[..., 3:]), -1), ema_decay=0.0)


@fault(FACTORS, "a Cholesky factorisation that fails, in float64 too", "the last inverse is kept",
       counts=("failed_inverses",), variants=({"direction": "natural"}, {}))  # fmt: skip
def no_cholesky(scene: Scene) -> None:
    scene.make()
    own = scene.optimizer.state[scene.model.up.weight]
    kept = {kind: own[kind].clone() for kind in ("whitener", "inverse") if kind in own}
    real = torch.linalg.cholesky_ex
    scene.patch.setattr(
        torch.linalg, "cholesky_ex", lambda m: (real(m)[0], torch.ones(m.shape[:-2], dtype=torch.int32))
    )
    scene.step()
    assert kept and all(torch.equal(own[kind], value) for kind, value in kept.items())


@fault(FACTORS, "logits of NaN under `fisher=true`",
       "labels are drawn all the same, the factors of this step are left out",
       counts=("skipped_factors", "skipped_gradients"),
       variants=({"fisher": "true"}, {"fisher": "true", "family": "kfac"}))  # fmt: skip
def bad_draw(scene: Scene) -> None:
    spoil_once(scene, lambda h: h * NAN)
