"""``--optim muon`` and ``--optim soap``: LNGD's nearest relatives through the same arguments, to compare with.

Both take the matrices that LNGD would take, with AdamW beside them at the same rate. One process or DDP, in which each
process does all of it.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import LNGDConfig
from ..linalg import fast_bfloat16
from ..routing import route, unwrapped
from .launching import refuse_sharding

logger = logging.getLogger(__name__)


class WithAdamW(torch.optim.Optimizer):
    """An optimizer of matrices, and AdamW, as one: its groups and its state are theirs."""

    def __init__(self, matrices: torch.optim.Optimizer, others: torch.optim.Optimizer) -> None:
        self.parts = (matrices, others)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        matrices, others = self.parts
        count = len(matrices.param_groups)
        matrices.param_groups, others.param_groups = self.param_groups[:count], self.param_groups[count:]
        matrices.state = others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = self.parts
        with flattened([p for group in matrices.param_groups for p in group["params"]]):
            matrices.step()
        others.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._share()


@contextmanager
def flattened(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Convolutions as matrices [out, in · kernel] for a while, which are all that torch.optim.Muon takes."""
    kept = [(p, p.shape, p.grad) for p in weights if p.dim() > 2]
    for p, _, grad in kept:
        p.grad = None  # whose shape has to be the parameter's
        p.data = p.data.flatten(1)
        p.grad = None if grad is None else grad.flatten(1)
    try:
        yield
    finally:
        for p, shape, grad in kept:
            p.grad = None
            p.data = p.data.view(shape)
            p.grad = grad


BASELINES = ("muon", "soap")


def name_of(value: Any) -> str:
    """Of an optimizer or another choice that may be a member of transformers' enums."""
    return str(getattr(value, "value", value))


def is_baseline(args: Any) -> bool:
    """True if these arguments ask for one of `BASELINES`."""
    return name_of(args.optim) in BASELINES


def class_and_settings(args: Any) -> tuple[Any, dict[str, Any]]:
    """The optimizer of the matrices and what it is made with: `optim_args` (``name=value,name=value``, a pair as
    ``0.9:0.95``), and rate and decay of the arguments.

    Raises:
        ValueError: a name that it does not know, or a package that is not installed.
    """
    settings: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay or 0.0}
    kind: Any = torch.optim.Muon
    if name_of(args.optim) == "muon":
        settings["adjust_lr_fn"] = "match_rms_adamw"  # with which AdamW's rates suit it
    else:
        try:
            import pytorch_optimizer
        except ImportError as error:
            message = "optim: got 'soap', whose package pytorch-optimizer is missing: pip install pytorch-optimizer"
            raise ValueError(message) from error
        kind = pytorch_optimizer.SOAP
    accepted = [name for name in inspect.signature(kind).parameters if name not in ("params", "kwargs")]
    for item in filter(None, (args.optim_args or "").split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or name not in accepted:
            raise ValueError(f"optim_args: got {item!r}, accepted: name=value with {', '.join(accepted)}")
        try:
            settings[name] = ast.literal_eval(value.replace(":", ","))
        except (ValueError, SyntaxError):
            settings[name] = value
    return kind, settings


def make_baseline(model: nn.Module, args: Any, groups: Sequence[Any] = ()) -> WithAdamW:
    """The optimizer that these arguments ask for.

    Args:
        groups: what a trainer of another library makes itself, which neither of them obeys.

    Raises:
        RuntimeError: parameters are split over processes. ValueError: bad settings, or groups of a trainer's own.
    """
    name, (kind, settings) = name_of(args.optim), class_and_settings(args)
    refuse_sharding(args, model, name)
    if groups:
        raise ValueError(f"optim: got {name!r} for a trainer that makes parameter groups of its own, accepted: lngd")
    routing = route(unwrapped(model), LNGDConfig(embedding="fallback"))
    of_kind: dict[Any, list[nn.Parameter]] = {}
    for r in routing.routes:
        of_kind.setdefault(r.kind, []).append(routing.parameters[r.parameter])
    matrices, others = of_kind.get("lngd", []), ("fallback", "fallback_no_decay")
    if not matrices:
        raise ValueError(f"optim: got {name!r} for a model without matrices that are trained, accepted: AdamW")
    if name == "muon" and not fast_bfloat16(matrices[0].device):
        logger.warning("optim: muon multiplies in bfloat16, which this device emulates: its seconds tell nothing")
    decays = dict(zip(others, (settings["weight_decay"], 0.0), strict=True))
    entries = [{"params": of_kind.get(one, []), "weight_decay": decay} for one, decay in decays.items()]
    with flattened(matrices):
        try:
            first = kind(matrices, **settings)
        except TypeError as error:  # of a setting of another kind
            given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
            raise ValueError(f"optim_args: got {given} for {name} ({error})") from error
    betas = (args.adam_beta1, args.adam_beta2)
    beside = torch.optim.AdamW(entries, settings["lr"], betas, args.adam_epsilon)
    return WithAdamW(first, beside)
