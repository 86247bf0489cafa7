"""The optimizers that the benchmarks compare, each from the same settings.

Matrices (the weights of linear layers and convolutions) get the rival's own update at rate `lr`; everything else
(embeddings, norms, biases) gets AdamW at rate `other_lr`. Decoupled weight decay acts on matrices and embeddings, not
on norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig

# What is tuned, in the order in which a search moves it.
RATES = ("weight_decay", "lr", "other_lr", "fresh")
BETA2 = 0.999
DECAY = 0.1
SOAP_BETA2 = 0.95  # its default
MUON_SCALE = 0.2  # root mean square of an update at rate 1: torch.optim.Muon's "match_rms_adamw"


@dataclass(frozen=True)
class Settings:
    """What is tuned: rates of matrices and of all else (none: the same), `fresh` = 1 − momentum of the matrices (β1 of
    AdamW and SOAP); also weight decay, and LNGD's own fields (`a=b,c=d`)."""

    lr: float
    other_lr: float | None
    fresh: float = 0.1
    weight_decay: float = DECAY
    fields: str = ""

    @property
    def rest(self) -> float:
        """The rate of what is no matrix."""
        return self.lr if self.other_lr is None else self.other_lr

    def to_dict(self) -> dict[str, Any]:
        """As a JSON row holds it."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        fields = f" {self.fields}" if self.fields else ""
        decay = "" if self.weight_decay == 0.1 else f" decay {self.weight_decay:g}"
        return f"{self.lr:.3g}/{self.rest:.3g}/{1 - self.fresh:.3g}{decay}{fields}"


class Together:
    """Several optimizers stepped as one."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forgets every gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def capture(self, active: bool) -> None:
        """Switches the hooks of those that have any (LNGD): on for training, off for evaluation."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, LNGD):
                (optimizer.train if active else optimizer.eval)()

    def fisher_pass(self, logits: Tensor, labels: Tensor) -> None:
        """The second backward pass of those that need one now (LNGD with ``fisher=true``), before that of the loss.

        Args:
            logits: [..., classes]; labels: [...], -100 where there is none.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, LNGD) and optimizer.needs_fisher_pass:
                optimizer.fisher_backward(logits, labels != -100)

    def close(self) -> None:
        """Removes hooks."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, LNGD):
                optimizer.close()

    def state_bytes(self) -> int:
        """Bytes of optimizer state: each tensor of it once."""
        total = 0
        for optimizer in self.optimizers:
            if isinstance(optimizer, LNGD):
                total += optimizer.memory_usage()["total"]
            else:
                total += sum(t.untyped_storage().nbytes() for t in tensors_of(list(optimizer.state.values())))
        return total


def tensors_of(value: Any) -> list[Tensor]:
    """Every distinct tensor within nested dicts, sequences and objects."""
    found: dict[int, Tensor] = {}

    def walk(item: Any) -> None:
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, dict):
            for inner in item.values():
                walk(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                walk(inner)
        elif hasattr(item, "__dict__"):  # Shampoo keeps objects
            walk(vars(item))

    walk(value)
    return list(found.values())


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(weights of linear layers and convolutions, embeddings, all else); a weight tied to an embedding is one."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, kinds)} - embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        [p for p in trained if id(p) in linear],
        [p for p in trained if id(p) in embeddings],
        [p for p in trained if id(p) not in linear | embeddings],
    )


def adamw_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """AdamW's groups of all that is no matrix."""
    _, embeddings, rest = split(model)
    return [
        {"params": embeddings, "lr": settings.rest, "weight_decay": settings.weight_decay},
        {"params": rest, "lr": settings.rest, "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, BETA2), fused=not any(p.is_meta for g in groups for p in g["params"]))


def adamw(model: nn.Module, settings: Settings) -> Together:
    """AdamW with two rates."""
    matrices = {
        "params": split(model)[0],
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "betas": (1 - settings.fresh, BETA2),
    }
    return Together([_adamw([matrices, *adamw_groups(model, settings)])])


def sgd(model: nn.Module, settings: Settings) -> Together:
    """SGD with Nesterov's momentum beside AdamW; weight decay of the matrices is SGD's, a part of the gradient."""
    matrices = {"params": split(model)[0], "lr": settings.lr, "weight_decay": settings.weight_decay}
    own = torch.optim.SGD([matrices], momentum=1 - settings.fresh, nesterov=True)
    return Together([own, _adamw(adamw_groups(model, settings))])


class FlatMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices only, on weights of any shape: convolutions as [out, in · kernel]."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        self._weights = params
        self._views = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in params]
        super().__init__(self._views, **settings)

    def step(self, closure: Any = None) -> Any:
        """One step of those that have a gradient."""
        for weight, view in zip(self._weights, self._views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.view(view.shape)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the weights."""
        for weight in self._weights:
            weight.grad = None


def muon(model: nn.Module, settings: Settings) -> Together:
    """torch.optim.Muon, its update scaled to AdamW's size, beside AdamW."""
    own = FlatMuon(
        split(model)[0],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=1 - settings.fresh,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together([own, _adamw(adamw_groups(model, settings))])


def _library(rival: str) -> Any:
    """pytorch-optimizer. Raises ValueError, naming the rival, where it is not installed."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ValueError(f"{rival}: needs pytorch-optimizer; install hf_lngd[bench]") from error
    return pytorch_optimizer


def soap(model: nn.Module, settings: Settings) -> Together:
    """SOAP of pytorch-optimizer (the extra `bench`) beside AdamW."""
    own = _library("soap").SOAP(
        split(model)[0], lr=settings.lr, weight_decay=settings.weight_decay, betas=(1 - settings.fresh, SOAP_BETA2)
    )
    return Together([own, _adamw(adamw_groups(model, settings))])


def shampoo(model: nn.Module, settings: Settings) -> Together:
    """Shampoo of pytorch-optimizer (Anil et al. 2020: blocks, grafted to RMSProp's size) beside AdamW; roots are
    computed every ten steps, as SOAP's basis."""
    library = _library("shampoo")
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    own = library.ScalableShampoo(
        split(model)[0],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(1 - settings.fresh, SOAP_BETA2),
        moving_average_for_momentum=True,
        decoupled_weight_decay=True,
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        graft_type=LayerWiseGrafting.RMSPROP,
    )
    return Together([own, _adamw(adamw_groups(model, settings))])


def lngd(model: nn.Module, settings: Settings) -> Together:
    """LNGD with its default preset, changed by `settings.fields`.

    With two rates, `lr` is on the scale of Muon's (updates of AdamW's settled size). With one it is what users give:
    LNGD's own scale, and its own rule for what is no matrix.
    """
    scale: dict[str, Any] = {}
    if settings.other_lr is not None:
        other = settings.other_lr / settings.lr
        scale = {"rate_scale": MUON_SCALE, "weight_decay": settings.weight_decay, "fallback_lr_scale": other}
    elif settings.weight_decay != DECAY:  # that of all rivals, where LNGD has a rule of its own
        scale = {"weight_decay": settings.weight_decay}
    config = LNGDConfig.from_optim_args(
        settings.fields,
        momentum=1 - settings.fresh,
        betas=(0.9, BETA2),
        **scale,
    )
    return Together([LNGD(model, config, lr=settings.lr)])


RIVALS: dict[str, Callable[[nn.Module, Settings], Together]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
    "soap": soap,
    "shampoo": shampoo,
    "lngd": lngd,
}
LABELS = {
    "sgd": "SGD + AdamW",
    "adamw": "AdamW (two rates)",
    "adamw-one": "AdamW (one rate)",
    "muon": "Muon + AdamW",
    "soap": "SOAP + AdamW",
    "shampoo": "Shampoo + AdamW",
    "lngd": "LNGD",
}


def label(name: str) -> str:
    """A rival's name for tables and figures."""
    return LABELS.get(name, name)
