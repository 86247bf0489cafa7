"""Rows: batches without positions, layers called as no one expects, steps without passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.fault_table import ALL, DIRECTIONS, Scene, fault
from tests.helpers import Words, seeded

BATCHES, CALLS, STEPS = "Batches", "Calls of layers", "Steps"
PAPER = ({}, {"preset": "paper"})


def empty(scene: Scene) -> dict[str, Tensor]:
    return {"ids": scene.batch()["ids"][:0]}


@fault(BATCHES, "a batch without rows, its loss a sum",
       "factors of this step are left out; its gradients are zero, and so is the adaptive rate",
       counts=("skipped_factors",), variants=ALL[:3])  # fmt: skip
def no_rows(scene: Scene) -> None:
    scene.make()
    scene.model(**empty(scene)).sum().backward()
    scene.finish()


@fault(BATCHES, "a batch without rows as the very first", "factors stay the identity until there are some",
       counts=("skipped_factors",), variants=({}, {"direction": "natural"}, {"preset": "paper"}))  # fmt: skip
def no_rows_first(scene: Scene) -> None:
    scene.make(steps=0)
    scene.model(**empty(scene)).sum().backward()
    scene.finish()


@fault(BATCHES, "a batch without rows, its loss a mean: NaN, with gradients of zero",
       "factors of this step are left out", counts=("skipped_factors",), variants=ALL[:3])  # fmt: skip
def mean_of_nothing(scene: Scene) -> None:
    scene.make()
    scene.step(empty(scene))


def all_padding(scene: Scene, mask: Tensor) -> None:
    phi = scene.phi("up")
    scene.step({**scene.batch(), "attention_mask": mask})
    assert torch.equal(phi, scene.phi("up"))


@fault(BATCHES, "a batch of nothing but padding", "factors of this step are left out, the step is made",
       counts=("skipped_factors",), variants=DIRECTIONS)  # fmt: skip
def padding(scene: Scene) -> None:
    scene.make(steps=0)
    scene.step({**scene.batch(), "attention_mask": torch.ones(4, 5)})
    all_padding(scene, torch.zeros(4, 5))


@fault(BATCHES, "labels that are all −100", "factors of this step are left out, the step is made",
       counts=("skipped_factors",), variants=ALL[:3])  # fmt: skip
def no_labels(scene: Scene) -> None:
    scene.make(steps=0)
    scene.step({**scene.batch(), "labels": torch.ones(4, 5, dtype=torch.int64)})
    phi = scene.phi("up")
    scene.step({**scene.batch(), "labels": torch.full((4, 5), -100)})
    assert torch.equal(phi, scene.phi("up"))


@fault(BATCHES, "a mask that comes only after the first factor steps", "it counts from then on", variants=DIRECTIONS)
def late_mask(scene: Scene) -> None:
    scene.make(ema_decay=0.0)
    batch, mask = scene.batch(), torch.ones(4, 5)
    mask[:, 3:] = 0
    scene.backward({**batch, "attention_mask": mask})
    with torch.no_grad():
        a = scene.model.embed(batch["ids"])[:, :3].flatten(0, 1)
        slope = 1 - torch.tanh(scene.model.up(a)).square()  # φ', which the polar direction takes as 1
        slope = slope if scene.optimizer.config.direction == "natural" else torch.ones_like(slope)
    scene.finish()
    torch.testing.assert_close(scene.phi("up"), (a * slope.square().sum(-1, keepdim=True)).T @ a / len(a))


@fault(BATCHES, "batches of other sizes and lengths, of one position", "a step as ever", variants=ALL)
def other_sizes(scene: Scene) -> None:
    scene.make()
    for rows, length in ((1, 7), (9, 1), (3, 12), (1, 1)):
        scene.step(scene.batch(rows, length))


class Twice(Words):
    """Calls a layer once more, in the other order, or not at all."""

    mode = "once"

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(6, 6)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if self.mode == "extra":
            x = x + self.extra(x)
        h = torch.tanh(self.up(x))
        if self.mode == "twice":
            h = h + torch.tanh(self.up(2 * x))
        if self.mode == "order":  # down before up, of another tensor
            return self.down(self.norm(x.new_ones(*x.shape[:2], 8))) + self.down(self.norm(torch.tanh(self.up(x))))
        return self.down(self.norm(h))


@fault(CALLS, "a layer that is called twice in one forward pass", "its factors are of both calls", variants=ALL)
def twice(scene: Scene) -> None:
    model, _ = scene.make(seeded(Twice))
    model.mode = "twice"
    scene.step()


@fault(CALLS, "layers called in another order than in the first step", "nothing changes", variants=ALL)
def order(scene: Scene) -> None:
    model, _ = scene.make(seeded(Twice))
    model.mode = "order"
    scene.step()


@fault(CALLS, "a layer that is never called", "it rests: no gradient, no decay", variants=ALL)
def never(scene: Scene) -> None:
    model, _ = scene.make(seeded(Twice))
    before = seeded(Twice).extra.weight
    scene.step()
    assert torch.equal(before, model.extra.weight)


@fault(CALLS, "a layer that is first called after the first factor step",
       "it is trained, and from then on has a factor of its own, or that of who reads the same tensor",
       variants=ALL[:3])  # fmt: skip
def late(scene: Scene) -> None:
    model, _ = scene.make(seeded(Twice))
    before = model.extra.weight.clone()
    model.mode = "extra"
    scene.step()
    scene.step()
    assert not torch.equal(before, model.extra.weight)
    assert "extra" not in scene.optimizer.core.capture.topology.unseen


@fault(CALLS, "the same in a run that was resumed", "as above")
def late_resumed(scene: Scene) -> None:
    model, optimizer = scene.make(seeded(Twice))
    state = optimizer.state_dict()
    optimizer.close()
    scene.make(model, steps=0)
    scene.optimizer.load_state_dict(state)
    model.mode = "extra"
    scene.step()


@fault(CALLS, "a layer that is no longer called", "it rests", variants=ALL)
def no_longer(scene: Scene) -> None:
    model: Any = seeded(Twice)
    model.mode = "extra"
    scene.make(model)
    before = model.extra.weight.clone()
    model.mode = "once"
    scene.step()
    assert torch.equal(before, model.extra.weight)


def unwatched(scene: Scene, call: object) -> None:
    """Something is done with the model between two passes: the factor is the one without it."""
    found = []
    for do in (False, True):
        scene.seed = 0
        scene.make(ema_decay=0.0)
        if do:
            call(scene.model, torch.zeros(4, 5, dtype=torch.int64))
        scene.backward()
        scene.finish()
        found.append(scene.phi("up"))
    torch.testing.assert_close(*found)


for _name, _mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):

    @fault(CALLS, f"forward passes under `{_name}` within a step", "they do not count", variants=PAPER)
    def no_grad(scene: Scene, mode: Any = _mode) -> None:
        unwatched(scene, mode()(lambda model, ids: model(ids)))


@fault(CALLS, "torch.func: grad, vmap and jvp of the model within a step", "they do not count", variants=PAPER)
def functional(scene: Scene) -> None:
    def call(model: Words, ids: Tensor) -> None:
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (row[None],)).sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
        torch.func.jvp(lambda p: loss(p, ids[0]), (parameters,), (parameters,))

    unwatched(scene, call)


@fault(CALLS, "forward passes while `optimizer.eval()` holds", "they do not count", variants=PAPER)
def evaluation(scene: Scene) -> None:
    def call(model: Words, ids: Tensor) -> None:
        scene.optimizer.eval()
        model(ids)
        scene.optimizer.train()

    unwatched(scene, call)


for _text, _error, _outcome in (
    ("a forward pass that raises half way, then is tried again", MemoryError, "the first try does not count"),
    ("an interrupt (ctrl-C) in a forward pass", KeyboardInterrupt, "the pass does not count"),
):

    @fault(CALLS, _text, f"{_outcome}; no mode of torch stays entered")
    def raises(scene: Scene, error: type[BaseException] = _error) -> None:
        def call(model: Words, ids: Tensor) -> None:
            def fail(h: Tensor) -> Tensor:
                raise error

            model.spoil = fail
            try:
                model(ids)
            except error:
                model.spoil = None

        unwatched(scene, call)
        assert not torch.overrides._get_current_function_mode_stack()


@fault(STEPS, "a step without any gradient", "nothing is changed", variants=ALL)
def no_gradient(scene: Scene) -> None:
    scene.make()
    before = scene.weights()
    scene.finish()
    assert all(torch.equal(before[name], value) for name, value in scene.weights().items())


@fault(STEPS, "a first step whose forward pass was not seen", "it is made, with the layers' inputs taken as white",
       log="no forward pass was seen of 'up', 'down'",
       variants=({}, {"direction": "natural"}, {"family": "kfac"}))  # fmt: skip
def unseen(scene: Scene) -> None:
    scene.make(steps=0)
    before = scene.weights()
    scene.optimizer.eval()
    scene.model(**scene.batch()).square().mean().backward()
    scene.optimizer.step()
    scene.optimizer.zero_grad()
    assert not torch.equal(before["up.weight"], scene.weights()["up.weight"])
    scene.optimizer.train()


@fault(STEPS, "the same under `rate=adaptive`, in any step", "nothing is changed",
       error="rate: 'adaptive' saw no gradients of up, down in this step", variants=({"preset": "paper"},))  # fmt: skip
def unseen_rows(scene: Scene) -> None:
    scene.make()
    scene.optimizer.eval()
    scene.model(**scene.batch()).square().mean().backward()
    scene.refused_step(RuntimeError)
    scene.optimizer.train()


@fault(STEPS, "a factor step of `fisher=true` without `fisher_backward`", "nothing is changed",
       error="fisher: 'true' needs optimizer.fisher_backward(logits) after each forward of a factor step",
       variants=({"fisher": "true"},))  # fmt: skip
def no_second_pass(scene: Scene) -> None:
    scene.make()
    scene.model(**scene.batch()).square().mean().backward()
    scene.refused_step(RuntimeError)


@fault(STEPS, "two steps with the gradients of one pass", "the second takes no factors", variants=DIRECTIONS)
def two_steps(scene: Scene) -> None:
    scene.make()
    scene.backward()
    scene.optimizer.step()
    phi = scene.phi("up")
    scene.optimizer.step()
    assert torch.equal(phi, scene.phi("up"))


@fault(STEPS, "a backward pass that is made twice (`retain_graph`)", "gradients add up, factors do not", variants=PAPER)
def two_backwards(scene: Scene) -> None:
    scene.make(fisher="expected")
    loss = scene.model(**scene.batch()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    scene.finish()


@fault(STEPS, "a closure that raises", "nothing is changed", error="out of data", variants=ALL)
def closure(scene: Scene) -> None:
    scene.make()

    def fail() -> Tensor:
        raise ValueError("out of data")

    scene.refused_step(ValueError, fail)
