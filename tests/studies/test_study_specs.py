"""Spec files of studies: what they may hold, and what of a wrong one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_helpers import study

from benchmarks.studies import spec


def test_every_spec_is_a_study_of_its_task() -> None:
    for path in sorted(spec.SPECS.glob("*.toml")):
        found = spec.read(path)
        assert found.task == path.stem
        assert {"adamw", "lngd"} <= set(found.rivals)


def test_a_study_says_what_is_tuned_and_a_rival_may_differ(tmp_path: Path) -> None:
    rivals = {
        "adamw": "lr = 1.0\nother_lr = 1.0",
        "muon": "lr = 1.0",  # one rate: there is no other one to tune
        "lngd": 'lr = 1.0\nother_lr = 1.0\ntuned = ["weight_decay"]',
    }
    found = spec.read(study(tmp_path / "s.toml", tuned=["lr", "other_lr"], rivals=rivals)).rivals
    assert {name: entrant.tuned for name, entrant in found.items()} == {
        "adamw": ("lr", "other_lr"),
        "muon": ("lr",),
        "lngd": ("weight_decay",),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mnist"}, "task: got 'mnist'"),
        ({"steps": 3}, "steps: got 3"),
        ({"steps": None}, "got no steps"),
        ({"warmup": 0}, "warmup: got 0"),
        ({"trials": 0}, "trials: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"seeds": [101]}, r"seeds: got \[101\], accepted: seeds not tuned on"),
        ({"tuning_seeds": []}, r"tuning_seeds: got \[\]"),
        ({"fractions": [0.1]}, r"fractions: got \[0.1\], accepted: numbers from 0.67"),
        ({"fractions": 0.5}, "fractions: got 0.5"),
        ({"warmup": 12}, "warmup: got 12, accepted: an integer at least 1 and below steps"),
        ({"rivals": {"adamw": "lr = 1.0\nshorter = [3]"}}, r"rivals.adamw: shorter: got \[3\], accepted: of seeds"),
        ({"rivals": {"adamw": "lr = 1.0\nshorter = true"}}, "rivals.adamw: shorter: got True"),
        ({"rivals": {"adamw": "lr = 1.0\nother_lr = -1"}}, "rivals.adamw: other_lr: got -1"),
        ({"rivals": {"adamw": "lr = 1.0\nfresh = 1.0"}}, "rivals.adamw: fresh: got 1.0, accepted: a number between"),
        ({"rivals": {"adamw": "lr = 1.0\nweight_decay = -0.1"}}, "rivals.adamw: weight_decay: got -0.1"),
        ({"rivals": {"adamw": "lr = true"}}, "rivals.adamw: lr: got True"),
        ({"rivals": {"adamw": "lr = inf"}}, "rivals.adamw: lr: got inf"),
        ({"rivals": {"adamw": 'lr = 1.0\ntuned = "lr"'}}, "rivals.adamw: tuned: got 'lr', accepted: a list"),
        ({"tuned": "lr"}, "s.toml: tuned: got 'lr', accepted: a list"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"rivals": {}}, "got no rivals"),
        ({"rivals": {"adam": "lr = 1.0"}}, "rivals.adam: rival: got 'adam'"),
        ({"rivals": {"adamw": "rate = 1.0"}}, "rivals.adamw: got an unknown field 'rate'"),
        ({"rivals": {"adamw": "lr = 0.0"}}, "rivals.adamw: lr: got 0.0"),
        ({"rivals": {"adamw": 'lr = 1.0\ntuned = ["decay"]'}}, "rivals.adamw: tuned: got decay"),
        ({"tuned": ["lr", "decay"]}, "s.toml: tuned: got decay, accepted: weight_decay, lr, other_lr, fresh"),
        ({"rivals": {"muon": 'lr = 1.0\nfields = "damping=paper"'}}, "rivals.muon: fields: got 'damping=paper'"),
        ({"rivals": {"lngd": 'lr = 1.0\nfields = "damping=half"'}}, "damping: got 'half'"),
    ],
)
def test_bad_specs_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        spec.read(study(tmp_path / "s.toml", **changes))


def test_files_that_are_no_spec_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spec: got .*none.toml, accepted: a TOML file .*multi30k"):
        spec.read(tmp_path / "none.toml")
    (tmp_path / "s.toml").write_text("task = ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"spec: .*s.toml is no TOML file"):
        spec.read(tmp_path / "s.toml")
