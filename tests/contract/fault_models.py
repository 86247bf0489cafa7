"""Rows: models that change while they are trained, copies, pickles, hooks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from tests.contract.fault_table import ALL, DIRECTIONS, Scene, fault, net
from tests.helpers import hooks_of

PARAMETERS, MODULES, COPIES, HOOKS = "Parameters", "Modules, devices, dtypes", "Copies and pickles", "Hooks"
PAPER = ({}, {"preset": "paper"})
NOT_TRAINED = (
    "parameters have a gradient and are not trained: '…'. They were frozen, or no part of the model, when LNGD was made"
)


@fault(PARAMETERS, "a layer that is frozen for some steps", "it rests in these, its state is kept", variants=ALL)
def frozen(scene: Scene) -> None:
    model, _ = scene.make()
    before = scene.weights()
    model.up.requires_grad_(False)
    scene.step()
    assert torch.equal(before["up.weight"], model.up.weight) and torch.equal(before["up.bias"], model.up.bias)
    assert not torch.equal(before["down.weight"], model.down.weight)
    model.up.requires_grad_(True)
    scene.step()
    assert not torch.equal(before["up.weight"], model.up.weight)


@fault(PARAMETERS, "all of LNGD's layers frozen in mid-training", "AdamW goes on with the rest", variants=ALL)
def all_frozen(scene: Scene) -> None:
    model, _ = scene.make()
    before = scene.weights()
    model.up.weight.requires_grad_(False)
    model.down.weight.requires_grad_(False)
    scene.step()
    assert not torch.equal(before["norm.weight"], model.norm.weight)


@fault(PARAMETERS, "a parameter that was frozen when LNGD was made, and is thawed later", "it is not trained",
       log=NOT_TRAINED, variants=PAPER)  # fmt: skip
def thawed_later(scene: Scene) -> None:
    model = net()
    model.up.requires_grad_(False)
    scene.make(model)
    before = scene.weights()
    model.up.requires_grad_(True)
    scene.step()
    scene.step()
    assert torch.equal(before["up.weight"], model.up.weight)


@fault(PARAMETERS, "the same, given to `add_param_group`", "AdamW trains it", variants=PAPER)
def thawed_and_added(scene: Scene) -> None:
    model = net()
    model.up.requires_grad_(False)
    _, optimizer = scene.make(model)
    before = scene.weights()
    model.up.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.up.parameters())})
    scene.step()
    assert not torch.equal(before["up.weight"], model.up.weight)
    assert "exp_avg" in optimizer.state[model.up.weight]


@fault(PARAMETERS, "a parameter that is added to the model in mid-training", "it is not trained", log=NOT_TRAINED,
       variants=PAPER)  # fmt: skip
def added(scene: Scene) -> None:
    model, _ = scene.make()
    model.norm.register_parameter("extra", nn.Parameter(torch.ones(6)))
    model.spoil = lambda h: h * model.norm.extra
    scene.step()
    assert torch.equal(model.norm.extra, torch.ones(6))
    del model.norm.extra
    model.spoil = None


@fault(PARAMETERS, "all parameters of the optimizer are frozen, others are thawed", "nothing is trained",
       log=NOT_TRAINED, variants=PAPER)  # fmt: skip
def others_thawed(scene: Scene) -> None:
    model = net()
    model.up.requires_grad_(False)
    scene.make(model)
    before = scene.weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("up."))
    scene.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@fault(
    PARAMETERS,
    "a layer's gradients are masked (sparse fine-tuning)",
    "zeros fill up: a direction mixes the entries of a matrix; with `exclude` AdamW has the layer, and they stay zero",
)
def masked_gradients(scene: Scene) -> None:
    for fields, stays in (({}, False), ({"exclude": "up.weight"}, True)):
        model, _ = scene.make(steps=0, weight_decay=0.0, **fields)
        before, off = scene.weights(), torch.arange(48).view(8, 6) % 3 > 0
        hook = model.up.weight.register_hook(lambda gradient, off=off: gradient.masked_fill(off, 0.0))
        scene.step()
        scene.step()
        hook.remove()
        assert torch.equal(before["up.weight"][off], model.up.weight[off]) is stays
        assert not torch.equal(before["up.weight"], model.up.weight)


@fault(PARAMETERS, "a parameter that is given to the optimizer twice", "nothing is changed", error="some parameters …")
def given_twice(scene: Scene) -> None:
    model, optimizer = scene.make()
    before = [len(group["params"]) for group in optimizer.param_groups]
    with scene.refused():
        optimizer.add_param_group({"params": [model.up.weight]})
    assert [len(group["params"]) for group in optimizer.param_groups] == before


@fault(PARAMETERS, "weights that are loaded or overwritten in mid-training", "training goes on from them", variants=ALL)
def overwritten(scene: Scene) -> None:
    model, _ = scene.make()
    model.load_state_dict(net().state_dict())
    scene.step()


@fault(PARAMETERS, "a layer that is pruned in mid-training (`torch.nn.utils.prune`)",
       "what is kept of its weight is trained on", variants=ALL)  # fmt: skip
def pruned(scene: Scene) -> None:
    model, _ = scene.make()
    prune.l1_unstructured(model.up, "weight", 0.25)
    before, kept = scene.weights()["up.weight_orig"], model.up.weight_mask.bool()
    scene.step()
    scene.step()
    assert (before != model.up.weight_orig)[kept].all()
    prune.remove(model.up, "weight")


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


@fault(
    PARAMETERS, "a parametrization that is registered in mid-training", "the tensor within is trained on", variants=ALL
)
def parametrized(scene: Scene) -> None:
    model, _ = scene.make()
    parametrize.register_parametrization(model.up, "weight", Halved())
    within = model.up.parametrizations.weight.original
    before = within.detach().clone()
    scene.step()
    scene.step()
    assert (before != within).all()
    parametrize.remove_parametrizations(model.up, "weight", leave_parametrized=False)


@fault(PARAMETERS, "a weight in whose place another Parameter is put: by hand, by `load_state_dict(assign=True)`",
       "the new one is not trained", log=NOT_TRAINED, variants=PAPER)  # fmt: skip
def replaced_weights(scene: Scene) -> None:
    model, _ = scene.make(rate="none")
    old = {(m, name): p for m in model.modules() for name, p in m.named_parameters(recurse=False)}
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    before = scene.weights()
    scene.step()
    assert torch.equal(before["up.weight"], model.up.weight)
    assert not torch.equal(before["down.weight"], model.down.weight)
    model.load_state_dict(net().state_dict(), assign=True)
    before = scene.weights()
    scene.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for (module, name), p in old.items():
        module.register_parameter(name, p)


@fault(PARAMETERS, "layers that are made narrower in place (structured pruning)", "the new weights are not trained",
       log=NOT_TRAINED, variants=PAPER)  # fmt: skip
def narrowed(scene: Scene) -> None:
    model, _ = scene.make(rate="none")
    old = {module: module.weight for module in (model.embed, model.up)}
    for module, weight in old.items():
        module.weight = nn.Parameter(weight.detach()[:, :5].clone())
    before = scene.weights()
    scene.step()
    for name in ("embed.weight", "up.weight"):
        assert torch.equal(before[name], model.get_parameter(name))
    assert not torch.equal(before["down.weight"], model.down.weight)
    for module, weight in old.items():
        module.weight = weight


@fault(MODULES, "a layer without inputs or outputs", "AdamW has its parameters", variants=ALL)
def empty_layers(scene: Scene) -> None:
    model = net()
    model.up.extra = nn.ModuleList([nn.Linear(6, 0), nn.Linear(0, 6)])
    model.spoil = lambda h: h + model.up.extra[0](h).sum() + model.up.extra[1](h[..., :0])
    before = model.up.extra[1].bias.detach().clone()
    scene.make(model)
    assert not torch.equal(before, model.up.extra[1].bias)
    model.spoil = None


@fault(MODULES, "a layer that is replaced in mid-training", "the new one is not trained, the old one's state is kept",
       log=NOT_TRAINED, variants=PAPER)  # fmt: skip
def replaced(scene: Scene) -> None:
    model, _ = scene.make(rate="none")
    old, model.up = model.up, nn.Linear(6, 8)
    before = scene.weights()
    scene.step()
    assert torch.equal(before["up.weight"], model.up.weight)
    model.up = old


@fault(MODULES, "an activation that is replaced by another", "the derivative is the new one's, or 1", variants=ALL)
def other_activation(scene: Scene) -> None:
    model, _ = scene.make()
    model.act = torch.relu
    scene.step()


for _dtype in (torch.float64, torch.bfloat16):

    @fault(
        MODULES,
        f"the model moved to {str(_dtype).removeprefix('torch.')} in mid-training",
        "moments follow it, factors are float32 or as wide as the model"
        if _dtype == torch.float64
        else "moments follow it, factors stay float32",
        variants=(*DIRECTIONS, {"family": "kfac"}),
    )
    def moved(scene: Scene, dtype: torch.dtype = _dtype) -> None:
        model, optimizer = scene.make(embedding="fallback")
        mean = optimizer.state[model.up.weight]["momentum"].clone()
        model.to(dtype)
        scene.backward()
        assert torch.equal(optimizer.state[model.up.weight]["momentum"], mean)
        scene.finish()
        kind = optimizer.state[model.up.weight]["momentum"].dtype
        assert kind == torch.promote_types(dtype, torch.float32)
        assert optimizer.state[model.norm.weight]["exp_avg"].dtype == kind


@fault(MODULES, "the model moved to float16 in mid-training", "the step is refused; moved back, training goes on",
       error="up.weight: got a weight of torch.float16")  # fmt: skip
def moved_to_half(scene: Scene) -> None:
    model, _ = scene.make()
    model.half()
    scene.backward()
    with scene.refused():
        scene.finish()
    model.float()


@fault(MODULES, "the model moved to another dtype and back", "as if it had not been, to the bit", variants=DIRECTIONS)
def moved_and_back(scene: Scene) -> None:
    found = []
    for there in (False, True):
        scene.seed = 0
        model, _ = scene.make()
        if there:
            model.double().float()
        scene.step()
        found.append(scene.weights())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@fault(COPIES, "a deep copy of the model in a factor step", "it has no hooks of ours that act, and is not watched")
def deep_copy(scene: Scene) -> None:
    model, optimizer = scene.make(embedding="exact")
    phi = scene.phi("up")
    twin = copy.deepcopy(model)
    held = weakref.ref(optimizer)
    twin(**scene.batch()).sum().backward()
    scene.step()
    assert not torch.equal(scene.phi("up"), phi)
    optimizer.close()
    scene.optimizer = None
    del optimizer
    gc.collect()
    assert held() is None  # the copy holds nothing
    scene.make(model)


@fault(COPIES, "`torch.save(model)` in a factor step", "works; the file knows nothing of hf_lngd",
       variants=({}, {"embedding": "exact"}, {"preset": "paper"}))  # fmt: skip
def pickled(scene: Scene) -> None:
    model, _ = scene.make(embedding=scene.fields.get("embedding", "fallback"))
    buffer = io.BytesIO()
    assert hooks_of(model) > 0
    torch.save(model, buffer)
    assert b"hf_lngd" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    phi = scene.phi("up")
    batch = scene.batch()
    assert torch.equal(loaded(**batch), model(**batch))
    assert torch.equal(phi, scene.phi("up"))


NO_COPY = "LNGD: got a copy or pickle of the optimizer, which watches one model. Accepted: its state_dict()"


@fault(COPIES, "a copy or a pickle of the optimizer", "nothing is copied or written", error=NO_COPY)
def optimizer_copied(scene: Scene) -> None:
    model, optimizer = scene.make()
    for do in (copy.deepcopy, copy.copy, lambda o: copy.deepcopy((model, o)), pickle.dumps,
               lambda o: torch.save({"optimizer": o}, io.BytesIO())):  # fmt: skip
        with scene.refused(TypeError):
            do(optimizer)


@fault(HOOKS, "`close()`", "no hook is left, nothing holds the optimizer; close() again does nothing", variants=ALL)
def closed(scene: Scene) -> None:
    model, optimizer = scene.make(embedding="exact")
    held = weakref.ref(optimizer)
    optimizer.close()
    optimizer.close()
    assert hooks_of(model) == 0
    scene.optimizer = None
    del optimizer
    gc.collect()
    assert held() is None
    scene.make(model)


@fault(HOOKS, "a step after `close()`", "nothing is changed",
       error="LNGD.step(): this optimizer was closed; make a new one")  # fmt: skip
def step_after_close(scene: Scene) -> None:
    model, optimizer = scene.make()
    optimizer.close()
    scene.backward()
    scene.refused_step(RuntimeError)
    scene.make(model)


@fault(HOOKS, "an optimizer that is dropped without `close()`", "its hooks go with it", variants=ALL)
def dropped(scene: Scene) -> None:
    model, optimizer = scene.make(embedding="exact")
    assert hooks_of(model) > 0
    scene.optimizer = None
    del optimizer
    gc.collect()
    assert hooks_of(model) == 0
    scene.make(model)


@fault(HOOKS, "two optimizers on one model", "each has its own factors, alike", variants=PAPER)
def two(scene: Scene) -> None:
    model, first = scene.make(steps=0)
    scene.make(model, steps=0)
    scene.backward()
    first.step()
    phi = next(iter(first.factors("up").values()))
    scene.finish()
    if scene.optimizer.config.fisher == "expected":
        assert torch.equal(phi, scene.phi("up"))
    first.close()


@fault(HOOKS, "a hook of the user's that changes a layer's output", "factors are of what the layer made",
       variants=DIRECTIONS)  # fmt: skip
def other_hook(scene: Scene) -> None:
    model, _ = scene.make()
    handle = model.up.register_forward_hook(lambda m, a, out: out * 2)
    scene.step()
    handle.remove()


@fault(HOOKS, "a factor step that never comes (training stops)", "`close()` forgets what was gathered", variants=PAPER)
def stopped(scene: Scene) -> None:
    model, optimizer = scene.make()
    output = model(**scene.batch())
    held = weakref.ref(output)
    del output
    optimizer.close()
    gc.collect()
    assert held() is None
    scene.make(model)
