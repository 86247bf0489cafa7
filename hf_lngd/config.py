"""`LNGDConfig`: every choice of the optimizer, checked when it is made, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import CHECKS, FAMILIES, check_factor_dtype, check_family, invalid, one_of
from .optim_args import check_field_names, parse_items, text_of

# A factor this wide is never cut: the paper works with whole factors.
_UNCUT = 1 << 20

_FAST: dict[str, Any] = {
    "fisher": "expected",
    "direction": "polar",
    "rate": "rms",
    "rate_scale": 1.0,
    "rate_mu": 1e-8,
    "rate_rows": 8,
    "damping": "relative",
    "damping_rho": 1.0,
    "damping_min": 1e-5,
    "damping_max": 1e-2,
    "momentum": 0.8,
    "nesterov": True,
    "momentum_on": "gradient",
    "ema_decay": 0.95,
    "factor_interval": 20,
    "inverse_interval": 20,
    "stagger": True,
    "early_factors": True,
    "polar_interval": "auto",
    "gram_decay": 0.9,
    "matrix_dtype": "auto",
    "factor_dtype": "full",
    "bf16_update": "kahan",
    "row_decay": 0.95,
    "inverse_root": "auto",
    "weight_decay": 0.1,
    "weight_decay_scale": 15.0,
    "bias": "fallback",
    "max_factor_dim": "auto",
    "embedding": "rotated",
    "exclude": "",
    "fallback_lr": None,
    "fallback_lr_scale": 3.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "seed": 0,
    "chain": "activation",
    "head": "gaussian",
    "conv_rows": 8,
    "conv_memory": 64,
    "placement": "auto",
}

_PAPER: dict[str, Any] = _FAST | {
    "fisher": "sampled",
    "direction": "natural",
    "rate": "adaptive",
    "rate_rows": 1,
    "damping": "paper",
    "momentum": 0.9,
    "nesterov": False,
    "momentum_on": "update",
    "ema_decay": 0.95,
    "factor_interval": 100,
    "inverse_interval": 100,
    "stagger": False,
    "early_factors": False,
    "weight_decay": 0.004,
    "weight_decay_scale": 1.0,
    "bias": "factor",
    "max_factor_dim": _UNCUT,
    "embedding": "fallback",
    "fallback_lr_scale": 1.0,
    "chain": "full",
    "conv_rows": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": _FAST,
    "paper": _PAPER,
    "lngd_sample": _PAPER | {"rate": "none"},
    "lngd_lr": _PAPER | {"fisher": "true"},
}

# F of other families has g gᵀ in it, so g of a loss. The loss's own costs no second pass, as in public K-FAC.
_OF_GRADIENTS: dict[str, Any] = {"fisher": "empirical", "direction": "natural"}

# What a family puts in the place of the preset's values, unless the field is given.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = dict.fromkeys(FAMILIES, _OF_GRADIENTS) | {"lngd": {}}

# The value of a field that was not given: `__post_init__` puts the preset's or the family's in its place.
_FROM_PRESET: Any = type("FromPreset", (), {"__repr__": lambda self: "<preset>"})()


@dataclass(frozen=True, kw_only=True)
class LNGDConfig:
    """The settings of :class:`hf_lngd.LNGD`. A field that is not given takes the family's value, or else the preset's.

    Symbols are those of Liu et al., "A Layer-Wise Natural Gradient Optimizer for Training Deep Neural Networks",
    NeurIPS 2024 (below: the paper), equation numbers are its.

    Attributes:
        preset: ``fast`` (what measures best), ``paper`` (Algorithm 1 as published), ``lngd_sample`` (the paper's
            ablation without the adaptive rate), ``lngd_lr`` (its ablation without layer-wise sampling).
        family: what a layer's Fisher block is taken for. ``lngd``: Φ ⊗ Ψ, Ψ a diagonal. ``kfac``: A ⊗ B. ``ekfac``: a
            diagonal in their eigenbasis. ``tkfac``: δ P ⊗ Q, which keeps the trace. ``ng+``: one side, of per-sample
            matrix gradients. See `curvature.families`. All but ``lngd`` are ``direction=natural`` and default to
            ``fisher=empirical``; ``true`` is the other that they take. The rest is the preset's.
        fisher: where g² of a layer comes from. ``expected``: φ'(s)², the mean over the layer's own predictive
            distribution N(φ(s), I), no second pass. ``sampled``: one draw of it a position (the paper).
            ``true``: labels drawn from the model, needs `LNGD.fisher_backward`. ``empirical``: the loss's gradients.
        direction: ``natural`` Ψ⁻¹GΦ⁻¹; ``polar``: G orthogonalised in Φ-whitened coordinates; ``gram``: the same
            with a running average of the whitened Gram matrix, recomputed every `polar_interval` steps.
        rate: the layer's rate α_l. ``adaptive``: Eq. 12-13 over rows of the batch (keeps one row in `rate_rows`
            of every layer's inputs and gradients, each step). ``rms``: `rate_scale` / RMS(D). ``trust``:
            `rate_scale` / sqrt⟨ΨDΦ, D⟩. ``none``: 1.
        rate_scale: κ of ``rms`` and ``trust``. 1: the size of AdamW's first steps, with which AdamW's rates suit
            LNGD; 0.2: its settled size (Muon's ``match_rms_adamw``), for rates five times as high.
        rate_mu: μ of Eq. 13 (the paper gives no value).
        rate_rows: ``adaptive`` looks at one row of the batch in this many; 1 is exact.
        damping: ``relative`` λ = ρ · tr/dim; ``paper`` λ = clamp(tr/dim, ν1, ν2).
        damping_rho: ρ of ``relative``.
        damping_min: ν1 of ``paper``.
        damping_max: ν2 of ``paper``.
        momentum: τ.
        nesterov: look one step ahead along the momentum.
        momentum_on: ``update`` averages α_l D (Algorithm 1); ``gradient`` averages G before it is preconditioned.
        ema_decay: ε of Eq. 14, the weight of the old factor.
        factor_interval: T_FIM, steps between two looks at the factors.
        inverse_interval: T_INV, steps between two inverses of a factor.
        stagger: spread the inverses of the layers over the steps of an interval.
        early_factors: before the first interval is over, also look and invert at steps 1, 2, 4, 8, …: the factors
            of the very first step are those of an untrained model.
        polar_interval: steps between two inverse roots of a layer's Gram matrix (``gram``); ``auto``: 4 up to a width
            of 128, 8 above, since a root costs as the cube of it.
        gram_decay: weight of the old Gram matrix, a step; its power after an interval of several (``gram``).
        matrix_dtype: of the products of each step (``polar``, ``gram``, rotated embeddings): ``bfloat16``, as in
            torch.optim.Muon, ``full``, or ``auto``: bfloat16 where the device has instructions for it, else full, since
            emulating it takes four times as long. Roots are halved only where they are kept for such products (so in
            ``auto`` everywhere: a checkpoint goes from one machine to another); float64 models are always ``full``.
        factor_dtype: in which running Φ (A and B, P and Q, C) are kept, in memory and in checkpoints, and their sums
            travel between processes: ``bfloat16`` is half the bytes of both, or ``full``. Sums, averages, damping and
            inverses are made in full precision either way; averages are rounded at random, alike after a resume. A
            checkpoint of the other precision is converted. Ψ and EKFAC's s stay full. Rounding moves eigenvalues, so
            ``bfloat16`` takes ``damping=relative`` and a `damping_rho` of at least 0.3 only.
        bf16_update: how bfloat16 weights (not autocast's float32 ones) take updates that are less than the gap between
            their numbers. ``kahan``: what rounding took off is kept, two bytes a weight; ``stochastic``: rounded at
            random, the same in every process; ``nearest``: lost, as in torch's optimizers. Fallback and embeddings too.
        row_decay: weight of the old mean in a running mean square of each row of D, by whose root the row is divided
            (NorMuon's row scale: a Ψ estimated from updates); 0: rows are left as they are (``polar``, ``gram``).
        inverse_root: how the (·)^(-1/2) of ``gram`` are computed: ``eigh`` (exact), ``newton`` (matrix products only,
            no host synchronisation), ``auto``: eigh on the CPU, newton on accelerators.
        weight_decay: decoupled, never on norms and biases.
        weight_decay_scale: layers of LNGD take this multiple of `weight_decay`. Weights settle where steps and decay
            balance, at κ · sqrt(lr / 2 decay): at AdamW's size with (κ / 0.2)² = 25 times its decay.
        bias: ``factor``: a last column of the layer's factor; ``fallback``: AdamW.
        max_factor_dim: a wider Φ (A and B, P and Q) is cut into equal diagonal blocks no wider than this; ``auto``:
            min(fan-in, fan-out) of the layer, but 64 at the least.
        embedding: ``fallback``: AdamW; ``rotated``: AdamW in the eigenbasis of the table's gradients, the d × d side;
            ``exact``: Φ of one-hot inputs, that is token frequency. All at the fallback's rate.
        exclude: a regular expression; parameters whose name it matches (`re.search`) go to AdamW.
        fallback_lr: AdamW's rate for what no layer owns; none: lr × `fallback_lr_scale`.
        fallback_lr_scale: see `fallback_lr`. Embeddings, norms and biases learn best at about three times the matrices'
            rate, with AdamW, too.
        betas: AdamW's, for what no layer owns.
        eps: AdamW's, for what no layer owns.
        seed: of the draws of ``sampled`` and ``true``, and of rounding at random; the user's random state is never
            touched.
        chain: which functions after a layer φ is made of. ``activation``: one that follows at once; ``full``: also
            norms (their statistics held fixed), sums, gates and layout changes up to the activation and its gate.
            Dropout counts as identity.
        head: the predictive distribution of the layer that makes the model's logits: ``gaussian`` as for every layer
            (the paper), or ``categorical``: the model's own, E[g²] = p(1 − p).
        conv_rows: one row of the batch in this many estimates the factors of convolutions; 1: all of them.
        conv_memory: MiB that the patches of a convolution's input may take at once, in a factor step.
        placement: of inverses of factors over several processes. ``spread``: each is computed by one of them and sent
            to all; ``replicated``: by every one; ``auto``: what a cost model finds quicker, step by step. Roots of
            ``gram`` and the embedding's eigenbasis are made on every rank.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """

    preset: str = "fast"
    family: str = "lngd"
    fisher: str = _FROM_PRESET
    direction: str = _FROM_PRESET
    rate: str = _FROM_PRESET
    rate_scale: float = _FROM_PRESET
    rate_mu: float = _FROM_PRESET
    rate_rows: int = _FROM_PRESET
    damping: str = _FROM_PRESET
    damping_rho: float = _FROM_PRESET
    damping_min: float = _FROM_PRESET
    damping_max: float = _FROM_PRESET
    momentum: float = _FROM_PRESET
    nesterov: bool = _FROM_PRESET
    momentum_on: str = _FROM_PRESET
    ema_decay: float = _FROM_PRESET
    factor_interval: int = _FROM_PRESET
    inverse_interval: int = _FROM_PRESET
    stagger: bool = _FROM_PRESET
    early_factors: bool = _FROM_PRESET
    polar_interval: int | str = _FROM_PRESET
    gram_decay: float = _FROM_PRESET
    matrix_dtype: str = _FROM_PRESET
    factor_dtype: str = _FROM_PRESET
    bf16_update: str = _FROM_PRESET
    row_decay: float = _FROM_PRESET
    inverse_root: str = _FROM_PRESET
    weight_decay: float = _FROM_PRESET
    weight_decay_scale: float = _FROM_PRESET
    bias: str = _FROM_PRESET
    max_factor_dim: int | str = _FROM_PRESET
    embedding: str = _FROM_PRESET
    exclude: str = _FROM_PRESET
    fallback_lr: float | None = _FROM_PRESET
    fallback_lr_scale: float = _FROM_PRESET
    betas: tuple[float, float] = _FROM_PRESET
    eps: float = _FROM_PRESET
    seed: int = _FROM_PRESET
    chain: str = _FROM_PRESET
    head: str = _FROM_PRESET
    conv_rows: int = _FROM_PRESET
    conv_memory: int = _FROM_PRESET
    placement: str = _FROM_PRESET

    def __post_init__(self) -> None:
        one_of("preset", self.preset, tuple(PRESETS))
        one_of("family", self.family, FAMILIES)
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not _FROM_PRESET]
        object.__setattr__(self, "_given", tuple(given))
        for name, value in (PRESETS[self.preset] | FAMILY_DEFAULTS[self.family]).items():
            if getattr(self, name) is _FROM_PRESET:
                object.__setattr__(self, name, value)
        if isinstance(self.betas, list):  # JSON has no tuples
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, check in CHECKS.items():
            check(name, getattr(self, name))
        check_family(self.family, self.to_dict())
        check_factor_dtype(self.factor_dtype, self.damping, self.damping_rho)
        if self.damping_min > self.damping_max:
            raise invalid("damping_min", self.damping_min, f"at most damping_max = {self.damping_max}")

    @classmethod
    def from_optim_args(cls, text: str | None, **overrides: Any) -> LNGDConfig:
        """Parse ``--optim_args``, e.g. ``"factor_interval=10,preset=fast,betas=0.9:0.98"``.

        Args:
            text: ``name=value`` items with commas between them; a comma inside a value (``exclude=a{1,2}``) is
                written ``\\,``. ``none`` is accepted where None is.
            **overrides: fields that stand above the preset and below `text`.

        Raises:
            ValueError: an item without ``=``, an unknown name (the closest are listed), a value of the wrong kind.
        """
        fields = dict(overrides)
        fields.update(parse_items(text or "", {"preset": "fast", "family": "lngd"} | _FAST))
        return cls(**fields)

    def with_fields(self, **fields: Any) -> LNGDConfig:
        """These settings with `fields` on top. Under another preset or family only what was given by name stays.

        Raises:
            ValueError: as the class; `preset` or `family` for settings that were given whole (``LNGDConfig(**d)``),
                in which it would change nothing.
        """
        given: tuple[str, ...] = self._given  # type: ignore[attr-defined]
        mine = self.to_dict()
        for name in ("preset", "family"):
            if fields.get(name, mine[name]) != mine[name] and set(mine) == set(given):
                raise invalid(name, fields[name], f"{mine[name]} on top of settings that name every field")
        return type(self)(**{name: mine[name] for name in given} | fields)

    def to_optim_args(self) -> str:
        """The shortest text that :meth:`from_optim_args` makes these settings of: the preset, and what differs."""
        family = {} if self.family == "lngd" else {"family": self.family}
        plain = type(self)(preset=self.preset, **family).to_dict()  # type: ignore[arg-type]
        changed = {name: value for name, value in self.to_dict().items() if value != plain[name]}
        return ",".join(f"{name}={text_of(v)}" for name, v in {"preset": self.preset, **family, **changed}.items())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values (tuples become lists), ready for JSON and for ``LNGDConfig(**d)``."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }


def _preset(cls: type[LNGDConfig], name: str, **fields: Any) -> LNGDConfig:
    """The preset of this name, with `fields` changed. Raises ValueError for an unknown one."""
    return cls(preset=name, **fields)


# `preset` is a field of an instance and a constructor of the class. A classmethod is no data descriptor, so an
# instance's own attribute hides it.
LNGDConfig.preset = classmethod(_preset)  # type: ignore[assignment]


def is_due(step: int, interval: int, config: LNGDConfig) -> bool:
    """Whether work of this interval falls on a step: each multiple, and with `early_factors` powers of two before."""
    early = config.early_factors and 0 < step < interval and step & (step - 1) == 0
    return step % interval == 0 or early


def settings_of(config: LNGDConfig | None, fields: Mapping[str, Any]) -> LNGDConfig:
    """The settings that :class:`hf_lngd.LNGD` was given: `fields` on top of `config`.

    Raises:
        ValueError: `config` is something else, such as the learning rate, which AdamW takes in that place; an unknown
            or bad field.
    """
    if config is not None and not isinstance(config, LNGDConfig):
        hint = (
            "settings by name, as in LNGD(model, **settings)" if isinstance(config, Mapping) else "the rate as lr=1e-3"
        )
        raise ValueError(f"config: got {config!r}, accepted: an LNGDConfig or None; {hint}")
    check_field_names(fields, [field.name for field in dataclasses.fields(LNGDConfig)], "LNGD")
    return LNGDConfig(**fields) if config is None else config.with_fields(**fields)
