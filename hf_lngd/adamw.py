"""All parameters that are in no layer of LNGD: AdamW, embeddings by token frequency; and weights in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .config import LNGDConfig
from .groups import Options
from .linalg import damping, rms_rate, squared_norms, state_dtype
from .torch_internals import Collector, Hook, in_transform, local, run_eagerly

ParameterState = MutableMapping[str, Any]  # what a parameter has, by name
States = MutableMapping[Any, ParameterState]


@contextmanager
def full_precision(weights: Sequence[Tensor], states: States) -> Iterator[list[Tensor]]:
    """The weights to work on in place: themselves, or in bfloat16's place float32, rounded when the block ends. Of
    sharded ones what this rank holds. If it raises, weights of bfloat16 stay as they were.

    Numbers in bfloat16 lie 0.4 to 0.8 % apart: what rounding takes off a weight is kept in its state under ``lost`` in
    bfloat16, in its shape, and comes back at its next change (Kahan), see `rest_of`."""
    whole = []
    for weight in weights:
        here = local(weight.detach())
        if weight.dtype == torch.bfloat16:
            state = states[weight]
            if "lost" not in state:
                state["lost"] = torch.zeros_like(weight.detach())
            here = here.float().add_(rest_of(here, local(state["lost"])))
        whole.append(here)
    yield whole
    for weight, value in zip(weights, whole, strict=True):
        if weight.dtype == torch.bfloat16:
            here = local(weight)
            here.copy_(value)
            local(states[weight]["lost"]).copy_(value.sub_(here))


def rest_of(weight: Tensor, lost: Tensor) -> Tensor:
    """What rounding took off `weight`, and 0 where `lost` cannot be that: somebody has written another number since.

    Rounding takes off half the gap to the next number at most. Numbers are asked, as versions of tensors do not tell of
    ``weight.data`` nor how a state that was saved belongs to its weights, and change where next to nothing does, as by
    a clamp after each step. A rest that passes is within the rounding of the new number."""
    nearest = lost.float().mul_(1 - 2**-8).add_(weight).to(weight.dtype)  # half a gap is the number's own yet
    return torch.where(nearest == weight, lost, 0)


def state_of(
    parameter: Tensor, states: States, new_state: Callable[[], dict[str, Tensor]], main: str
) -> ParameterState:
    """A parameter's state, made at its first step; as its entry `main`, which has the parameter's shape, it follows the
    parameter to another device, dtype or memory format."""
    state = states[parameter]
    if main not in state:
        state.update(new_state())
    here, dtype = state[main], state_dtype(parameter.dtype)
    if (here.device, here.dtype, here.stride()) != (parameter.device, dtype, parameter.stride()):
        state.update({name: value.copy_(state[name]) for name, value in new_state().items()})
    return state


class AdamW:
    """AdamW for parameters in no layer; torch's own function does the arithmetic, fused where they allow it. `skipped`:
    steps of a group that were passed over."""

    def __init__(self) -> None:
        self.skipped: Tensor | int = 0

    @staticmethod
    def new_state(parameter: Tensor) -> dict[str, Tensor]:
        """``step``, ``exp_avg`` and ``exp_avg_sq`` before the first step, in at least float32, sharded as it is."""
        zeros = torch.zeros_like(parameter.detach(), dtype=state_dtype(parameter.dtype))
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], options: Options, states: States, layout: Any) -> None:
        """One step of the parameters of a group that have a gradient. They all rest where the norm of a gradient is no
        number or overflows: AdamW would never recover."""
        if not parameters:
            return
        own = [state_of(p, states, partial(self.new_state, p), "exp_avg") for p in parameters]
        first, second = ([local(state[name]) for state in own] for name in ("exp_avg", "exp_avg_sq"))
        gradients = [local(p.grad) for p in parameters]  # type: ignore[arg-type]
        (squares,) = layout.complete([squared_norms(gradients)])
        bad = (~(squares < torch.inf)).any().long()
        self.skipped = self.skipped + bad
        with full_precision(parameters, states) as whole:
            gradients = [
                g.to(w.dtype) if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
                for g, w in zip(gradients, whole, strict=True)
            ]
            fused = all(  # which reads memory as it lies
                w.is_floating_point()
                and w.device.type in ("cpu", "cuda", "meta")
                and w.stride() == g.stride() == m.stride()
                for w, g, m in zip(whole, gradients, first, strict=True)
            )
            if not fused:  # which does not know `found_inf`: a gradient of zero comes closest
                gradients = [torch.where(bad > 0, torch.zeros_like(g), g) for g in gradients]
            how: dict[str, Any] = {"fused": True, "found_inf": bad.float()} if fused else {"foreach": True}
            rates = {"lr": options.lr, "beta1": options.momentum, "beta2": options.beta2, "eps": options.eps}
            how |= {"amsgrad": False, "maximize": False, "weight_decay": options.weight_decay, **rates}
            adamw(whole, gradients, first, second, [], [state["step"] for state in own], **how)


# A row's step is at most this multiple of the table's root mean square: a token seen once in many batches has next
# to no frequency, and would divide its gradient by the damping alone.
ROW_CAP = 4.0


def embedding_scale(
    norms: Tensor, frequency: Tensor, lam: Tensor, scale: float, shape: torch.Size, complete: Callable[[Tensor], Tensor]
) -> Tensor:
    """[V], by which the rows of G are multiplied to be D = (diag(f) + λ)⁻¹ G scaled to RMS κ, each row's RMS at most
    `ROW_CAP`·κ.

    Args:
        norms, frequency: of the rows of G and of their tokens, [V].
        shape: of the whole table, of which a process may have V rows.
        complete: a sum of squares of these rows → of all."""
    inverse = (frequency + lam).reciprocal()
    lengths = norms * inverse
    rate = rms_rate(complete(lengths.square().sum()).sqrt(), shape.numel(), scale)
    most = ROW_CAP * scale * shape[1] ** 0.5
    return inverse * rate * (most / (lengths * rate).clamp_min(most))


class EmbeddingTable(Collector):
    """An embedding table: a linear layer with one-hot inputs, whose Φ is diagonal, the frequency of each token. Counts
    in factor steps the tokens whose output gets a gradient: padding and forward passes without a backward do not count.

    Args:
        name: the parameter's name.
        weight: the table; under FSDP2 the sharded one.
        modules: the embeddings that share it; `padding_idx` is not counted.

    Attributes:
        skipped: gradients that were not finite."""

    def __init__(self, name: str, weight: nn.Parameter, modules: list[nn.Embedding], config: LNGDConfig) -> None:
        super().__init__(lambda: (self.weight,))
        self.name, self.weight, self.modules, self.config = name, weight, modules, config
        self._counting = False
        self.skipped: Tensor | int = 0

    def arm(self, factors: bool) -> None:
        """Attach the hooks that the coming step needs."""
        self.disarm()
        self.forget()
        self._counting = factors
        if factors and not self.closed:
            self._handles = [module.register_forward_hook(Hook(self._called)) for module in self.modules]
            run_eagerly(self, self.enabled)

    def forget(self) -> None:
        super().forget()
        self._counts: Tensor | None = None

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self.enabled or not args or in_transform():
            return
        ids = args[0].reshape(-1)

        def take(g: Tensor) -> None:
            if len(ids):
                if self._counts is None:
                    self._counts = torch.zeros(self.modules[0].num_embeddings, device=ids.device)
                self._counts.index_add_(0, ids, g.reshape(len(ids), -1).ne(0).any(-1).to(self._counts.dtype))

        self.follow(output, module.weight, take)  # type: ignore[arg-type]

    def new_state(self) -> dict[str, Tensor]:
        """``momentum`` [V, d], ``frequency`` [V] and its ``frequency_weight`` before the first step."""
        dtype = state_dtype(self.weight.dtype)
        momentum = torch.zeros_like(self.weight.detach(), dtype=dtype)
        frequency = torch.zeros(self.modules[0].num_embeddings, dtype=dtype, device=self.weight.device)
        return {"momentum": momentum, "frequency": frequency, "frequency_weight": frequency.new_zeros(())}

    def _update(self, state: ParameterState, layout: Any) -> None:
        """Eq. 14 of every token's frequency, with this step's counts of all processes."""
        frequency, weight = state["frequency"], state["frequency_weight"]
        counts, self._counts = self._counts, None
        if counts is None:
            counts = torch.zeros_like(frequency, dtype=torch.float32)
        (counts,) = layout.everyone.all_reduce([counts])
        padding = self.modules[0].padding_idx
        if padding is not None:
            counts[padding] = 0
        total = counts.sum()
        fresh = (1 - self.config.ema_decay) * (total > 0).to(frequency.dtype)
        frequency.mul_(1 - fresh).add_((counts / total.clamp_min(1)).to(frequency) * fresh)
        weight.mul_(1 - fresh).add_(fresh)

    @torch.no_grad()
    def step(self, options: Options, states: States, layout: Any) -> None:
        """One step, or none without a gradient."""
        if self.weight.grad is None:
            self._counts = None
            return
        state, c = state_of(self.weight, states, self.new_state, "momentum"), self.config
        if self._counting:
            self._update(state, layout)
        frequency, weight = state["frequency"], state["frequency_weight"]
        uniform = torch.full_like(frequency, 1.0 / self.modules[0].num_embeddings)
        frequency = torch.where(weight > 0, frequency / weight.clamp_min(1e-30), uniform)
        lam = damping(frequency.mean(), c.damping, c.damping_bounds)
        momentum, grad = local(state["momentum"]), local(self.weight.grad).to(frequency.dtype)
        (square,) = layout.complete([torch.linalg.vector_norm(grad).square()])
        bad = ~(square < torch.inf)
        self.skipped = self.skipped + bad
        grad = torch.where(bad, 0.0, grad)
        if c.momentum_on == "gradient":
            momentum.lerp_(grad, 1 - options.momentum)
            grad.lerp_(momentum, options.momentum)
        norms, own = torch.linalg.vector_norm(grad, dim=-1), frequency[layout.rows(frequency.shape[0])]
        scale = embedding_scale(norms, own, lam, c.rate_scale, self.weight.shape, lambda t: layout.complete([t])[0])
        scale = (scale * options.lr).unsqueeze(-1)
        if c.momentum_on == "update":
            grad, scale = momentum.mul_(options.momentum).addcmul_(grad, scale), torch.ones_like(scale)
        with full_precision([self.weight], states) as (whole,):
            whole.mul_(1 - options.lr * options.weight_decay).addcmul_(grad, scale, value=-1)
