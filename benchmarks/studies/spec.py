"""A study on one task, read from a TOML file: budget, seeds, and where the search of each rival starts."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.studies.rivals import RATES, RIVALS, Settings, label
from benchmarks.tasks.registry import TASKS
from hf_lngd import LNGDConfig

SPECS = Path(__file__).resolve().parent / "specs"
SHORTEST = 8  # steps: below, the quarters at which a run is evaluated fall together


@dataclass(frozen=True)
class Entrant:
    """One rival of a study.

    Attributes:
        rival: who makes its optimizer, of `benchmarks.studies.rivals.RIVALS`.
        start: where its search starts.
        tuned: which of `RATES` the search moves: all, but `other_lr` where the start has none.
        label: its name in tables and pictures.
        shorter: the seeds on which it is also reported at the study's `fractions`.
    """

    name: str
    rival: str
    start: Settings
    tuned: tuple[str, ...] = RATES
    label: str = ""
    shorter: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A study.

    Attributes:
        task: of `benchmarks.tasks.registry.TASKS`; its name is that of the file of results.
        title: of the picture.
        steps: length of a run.
        warmup: steps of rising rates in a run of full length; shorter ones have the same part of their own.
        threads: of torch.
        trials: tuning runs of every rival and tuning seed.
        tuned: what the searches move, of `RATES`; a rival may have a `tuned` of its own.
        tuning_seeds, seeds: of tuning and of the reported runs; none is both.
        fractions: lengths of shorter runs, each with its schedule to its own end, as parts of `steps`.
        rivals: by name.
    """

    task: str
    title: str
    steps: int
    warmup: int
    rivals: dict[str, Entrant]
    threads: int = 1
    trials: int = 6
    tuned: tuple[str, ...] = RATES
    tuning_seeds: tuple[int, ...] = (101,)
    seeds: tuple[int, ...] = (1, 2, 3)
    fractions: tuple[float, ...] = ()

    def lengths(self, name: str, seed: int) -> list[int]:
        """Steps of the reported runs of a rival on a seed, the longest first."""
        parts = [1.0, *(sorted(self.fractions, reverse=True) if seed in self.rivals[name].shorter else [])]
        return [round(self.steps * part) for part in parts]

    def warmup_of(self, steps: int) -> int:
        """Steps of rising rates in a run of this length: the schedule is the same, shorter."""
        return max(1, round(self.warmup * steps / self.steps))

    def label(self, name: str) -> str:
        """A rival's name for tables and pictures."""
        return self.rivals[name].label or label(name)


def read(path: Path) -> Spec:
    """The study of a file.

    Raises:
        ValueError: no such file, no TOML, or a field that is unknown, missing, or out of range: named.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SPECS.glob("*.toml")))
        raise ValueError(f"spec: got {path}, accepted: a TOML file such as those of benchmarks/studies/specs ({known})")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"spec: {path} is no TOML file: {error}") from error
    own = {field.name: field for field in fields(Spec)}
    _known(str(path), content, set(own))
    missing = [name for name in ("task", "title", "steps", "warmup", "rivals") if name not in content]
    if missing:
        raise ValueError(f"{path}: got no {', '.join(missing)}, accepted: all of task, title, steps, warmup, rivals")
    tuned = _tuples(content).get("tuned", RATES)
    _check_tuned(str(path), tuned)
    entrants = content.pop("rivals").items()
    rivals = {name: _entrant(f"{path}: rivals.{name}", name, value, tuned) for name, value in entrants}
    spec = Spec(rivals=rivals, **_tuples(content))
    _check(path, spec)
    return spec


def named(name: str) -> Spec:
    """The study of `benchmarks/studies/specs/NAME.toml`. Raises ValueError as :func:`read`."""
    return read(SPECS / f"{name}.toml")


def checked_steps(given: int | None, spec: Spec) -> int:
    """The steps of a run, from the command line or else the study's. Raises ValueError for too few."""
    if given is not None and given < SHORTEST:
        raise ValueError(f"--steps: got {given}, accepted: an integer at least {SHORTEST}")
    return spec.steps if given is None else given


def _known(where: str, found: dict[str, Any], accepted: set[str]) -> None:
    for key in found:
        if key not in accepted:
            raise ValueError(f"{where}: got an unknown field {key!r}, accepted: {', '.join(sorted(accepted))}")


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _check_tuned(where: str, tuned: Any) -> None:
    if not isinstance(tuned, tuple):
        raise ValueError(f"{where}: tuned: got {tuned!r}, accepted: a list of {', '.join(RATES)}")
    if strange := [rate for rate in tuned if rate not in RATES]:
        raise ValueError(f"{where}: tuned: got {', '.join(map(str, strange))}, accepted: {', '.join(RATES)}")


# What a rival's settings may be, where a study gives them: whether a number is good, and what is accepted.
_SETTINGS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: x > 0, "a rate above 0 to start from"),
    "other_lr": (lambda x: x > 0, "a rate above 0, or none: lr"),
    "fresh": (lambda x: 0 < x < 1, "a number between 0 and 1 (1 - momentum)"),
    "weight_decay": (lambda x: x >= 0, "a number from 0 on"),
}


def check_settings(where: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for a rate, momentum or decay that is no number or out of range."""
    for name, (good, accepted) in _SETTINGS.items():
        value = settings.get(name)
        if value is None and name != "lr":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and good(value)):
            raise ValueError(f"{where}: {name}: got {value!r}, accepted: {accepted}")


def _entrant(where: str, name: str, content: dict[str, Any], tuned: tuple[str, ...]) -> Entrant:
    rates = {field.name for field in fields(Settings)}
    _known(where, content, rates | {field.name for field in fields(Entrant)} - {"name", "start"})
    settings = {key: content.pop(key) for key in list(content) if key in rates}
    check_settings(where, settings)
    values = _tuples(content)
    rival = values.pop("rival", name)
    if rival not in RIVALS:
        raise ValueError(f"{where}: rival: got {rival!r}, accepted: {', '.join(RIVALS)}")
    if "other_lr" not in settings:  # tied to lr
        settings["other_lr"] = None
        tuned = tuple(rate for rate in tuned if rate != "other_lr")
    values.setdefault("tuned", tuned)
    entrant = Entrant(name, rival, Settings(**settings), **values)
    _check_tuned(where, entrant.tuned)
    if entrant.start.fields:
        if rival != "lngd":
            raise ValueError(f"{where}: fields: got {entrant.start.fields!r} for {rival}, accepted: for lngd only")
        LNGDConfig.from_optim_args(entrant.start.fields)
    return entrant


def _check(path: Path, spec: Spec) -> None:
    def need(name: str, good: Callable[[Any], bool], accepted: str) -> None:
        value = getattr(spec, name)
        if not good(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{path}: {name}: got {shown!r}, accepted: {accepted}")

    def is_count(value: Any, least: int) -> bool:
        return isinstance(value, int) and value >= least

    def are_seeds(value: Any) -> bool:
        return isinstance(value, tuple) and bool(value) and all(is_count(seed, 0) for seed in value)

    need("task", lambda task: task in TASKS, ", ".join(TASKS))
    need("steps", lambda steps: is_count(steps, SHORTEST), f"an integer at least {SHORTEST}")
    need("warmup", lambda steps: is_count(steps, 1) and steps < spec.steps, "an integer at least 1 and below steps")
    need("threads", lambda threads: is_count(threads, 1), "an integer at least 1")
    need("trials", lambda trials: is_count(trials, 1), "an integer at least 1")
    need("tuning_seeds", are_seeds, "a list of seeds")
    need("seeds", lambda seeds: are_seeds(seeds) and not set(seeds) & set(spec.tuning_seeds), "seeds not tuned on")
    shortest = SHORTEST / spec.steps
    inside = f"numbers from {shortest:.2g} (that is {SHORTEST} steps) to below 1"
    need("fractions", lambda parts: isinstance(parts, tuple) and all(shortest <= part < 1 for part in parts), inside)
    need("rivals", bool, "at least one")
    for name, entrant in spec.rivals.items():
        if not (isinstance(entrant.shorter, tuple) and set(entrant.shorter) <= set(spec.seeds)):
            got = list(entrant.shorter) if isinstance(entrant.shorter, tuple) else entrant.shorter
            raise ValueError(f"{path}: rivals.{name}: shorter: got {got!r}, accepted: of seeds = {list(spec.seeds)}")
