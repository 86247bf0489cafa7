"""The benchmarks beside the comparison: what they measure is counted right, and bad arguments are named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_helpers import core_forget_watchers, core_marian
from dist_pool import DistPool
from study_helpers import row_of, write_multi30k

from benchmarks import (
    compile_time,
    factor_dtype,
    invariance,
    option_effects,
    paper_tables,
    patch_memory,
    precision,
    runs,
    sharding,
    step_time,
    sweep_lr,
)
from benchmarks.rivals import Settings
from benchmarks.step_time import compare as paired
from benchmarks.tasks import Task
from hf_lngd import LNGDConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task in Multi30k's format."""
    return write_multi30k(tmp_path_factory.mktemp("multi30k"))


def test_bad_arguments_of_the_other_benchmarks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--task: got 'mnist'"):
        option_effects.main(["--task", "mnist", "--table"])
    with pytest.raises(ValueError, match="--rounds: got 0"):
        patch_memory.main(["--rounds", "0", "--results", str(tmp_path / "r.json")])


def test_paired_ratio() -> None:
    result = paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert result["ratio"] == result["ratio_of_medians"] == pytest.approx(1.1)
    assert result["standard_error"] == pytest.approx(0.1 / 3**0.5 / 2, rel=1e-2)


def test_the_refined_rate_is_a_parabolas_lowest_point() -> None:
    bowl = {rate: math.log(rate / 2e-3) ** 2 for rate in sweep_lr.RATES}
    assert sweep_lr.refine(bowl, 1e-3 if bowl[1e-3] < bowl[3e-3] else 3e-3) == pytest.approx(2e-3)
    assert sweep_lr.refine({1e-4: 1.0, 3e-4: 2.0}, 1e-4) == 1e-4
    assert sweep_lr.refine({1e-3: 2.0, 3e-3: 1.0, 1e-2: math.inf}, 3e-3) == 3e-3


class Classifier(torch.nn.Module):
    """A layer whose batches name their labels, as models of transformers do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(10, 10, bias=False)
        torch.nn.init.eye_(self.layer.weight).data.mul_(scale)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits, loss=torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize(("scale", "diverged"), [(5.0, False), (50.0, True)])
def test_an_easy_first_batch_is_no_measure_of_divergence(scale: float, diverged: bool) -> None:
    def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
        x = torch.eye(10)
        yield {"x": x, "labels": torch.arange(10)}  # what the model was trained for: a loss near 0
        while True:  # wrong for one in four: losses of about scale / 4
            yield {"x": x[:4], "labels": torch.tensor([1, 1, 2, 3])}

    task = Task("easy", lambda seed: Classifier(scale), batches, lambda model, tuning: {"loss": 1.0})
    row = runs.train("adamw", Settings(1e-6, 1e-6), 1, 8, 1, task, lambda step, loss: None)
    assert row["diverged"] is diverged


def test_the_sweep_reads_one_task_and_names_bad_rates(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--results", str(tmp_path / "sweep.json"), "--steps", "8"]
    with pytest.raises(ValueError, match=r"--rates: got -0\.1"):
        sweep_lr.main([*arguments, "--rates", "-0.1"])
    with pytest.raises(ValueError, match="--task: got 'mnist'"):
        sweep_lr.main(["--task", "mnist", "--table"])
    with pytest.raises(ValueError, match="--data: got none"):
        sweep_lr.main([])
    for module in (sweep_lr, option_effects):
        with pytest.raises(ValueError, match="--threads: got 0"):
            module.main(["--data", str(folder), "--threads", "0"])
    threads = torch.get_num_threads()
    for _ in range(2):
        sweep_lr.main([*arguments, "--rates", "1e-3"])
    torch.set_num_threads(threads)
    results = runs.Results(tmp_path / "sweep.json")
    assert len(results.rows) == len(sweep_lr.FRESH)
    assert "0.001" in sweep_lr.sweep_table(results, "multi30k", 8, 101)
    assert "0.001" not in sweep_lr.sweep_table(results, "cifar10-vit", 8, 101)
    with pytest.raises(ValueError, match="--steps: got 0, accepted: an integer at least 8"):
        sweep_lr.main([*arguments[:-1], "0"])


def test_short_runs_warm_up_for_a_part_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmups = []

    def train(name: str, settings: Settings, seed: int, steps: int, warmup: int, *_: Any, **__: Any) -> runs.Row:
        warmups.append((steps, warmup))
        return {**row_of(name, seed, [(steps, 1.0, 3.0)]), "task": "multi30k", "settings": settings.to_dict()}

    for module in (sweep_lr, option_effects):
        monkeypatch.setattr(module, "train", train)
    tuned = runs.Results(tmp_path / "tuned.json")
    tuned.add(row_of("lngd-same", 101, [(10, 1.0, 3.0)], "tune"))
    threads, common = torch.get_num_threads(), ["--data", str(folder), "--steps", "10", "--results"]
    sweep_lr.main([*common, str(tmp_path / "sweep.json"), "--rates", "1e-3"])
    option_effects.main([*common, str(tmp_path / "options.json"), "--tuned", str(tuned.path), "--part", "0", "20"])
    torch.set_num_threads(threads)
    assert set(warmups) == {(10, 2)} and len(warmups) == 3  # a fifth, as of the study's 300 steps


def test_option_effects_run_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = runs.Results(tmp_path / "tuned.json")
    results.add(row_of("lngd-same", 101, [(10, 1.0, 3.0)], "tune"))
    arguments = ["--data", str(folder), "--tuned", str(tmp_path / "tuned.json"), "--steps", "8"]
    arguments += ["--results", str(tmp_path / "options.json"), "--part", "0", str(len(option_effects.TRANSLATION) // 2)]
    threads = torch.get_num_threads()
    option_effects.main(arguments)
    option_effects.main(arguments)
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    chosen = list(option_effects.TRANSLATION)[:: len(option_effects.TRANSLATION) // 2]
    base = results.best("lngd-same")
    assert [row["settings"] for row in rows] == [option_effects.variant(name, base).to_dict() for name in chosen]
    assert rows[0]["settings"] == base.to_dict() and chosen[0] == ""
    assert "| nothing (the default) |" in capsys.readouterr().out


def test_option_effects_go_on_at_the_settings_of_their_first_row(tmp_path: Path) -> None:
    tuned, results = runs.Results(tmp_path / "tuned.json"), runs.Results(tmp_path / "options.json")
    tuned.add(row_of("lngd-same", 101, [(10, 1.0, 3.0)], "tune"))
    assert option_effects.base_of(results, tuned.path) == Settings(**tuned.rows[0]["settings"])
    first = Settings(7e-3, 1e-2, 0.4)
    results.add({**row_of("lngd", 11, [(10, 1.0, 3.0)], "option"), "settings": first.to_dict()})
    assert option_effects.base_of(results, tuned.path) == first  # whatever the study has found since


def test_option_effects_never_start_from_a_variant(tmp_path: Path) -> None:
    """Parts run in any order: a variant's row, at a rate of its own, is not what the others are compared with."""
    tuned, results = runs.Results(tmp_path / "tuned.json"), runs.Results(tmp_path / "options.json")
    tuned.add(row_of("lngd-same", 101, [(10, 1.0, 3.0)], "tune"))
    best = Settings(**tuned.rows[0]["settings"])
    natural = option_effects.variant("direction=natural,damping_rho=0.3", best)
    results.add({**row_of("lngd", 11, [(10, 1.0, 3.0)], "option"), "settings": natural.to_dict()})
    with pytest.raises(ValueError, match="options.json: has no row of the default"):
        option_effects.base_of(results, tuned.path)
    results.add({**row_of("lngd", 11, [(10, 1.0, 3.0)], "option"), "settings": best.to_dict()})
    assert option_effects.base_of(results, tuned.path) == best
    with pytest.raises(ValueError, match="--task: got 'marian-wmt', accepted: multi30k, cifar10-resnet, cifar10-vit"):
        option_effects.main(["--task", "marian-wmt", "--table"])
    for part in (["2", "2"], ["0", "0"], ["-1", "2"]):
        with pytest.raises(ValueError, match=f"--part: got {' '.join(part)}, accepted: I N"):
            option_effects.main(["--part", *part, "--table"])


def test_a_variant_of_another_size_changes_that_alone() -> None:
    base = Settings(2e-3, None, 0.2)
    for fields, factor in option_effects.VARIANTS.items():
        if fields.startswith("weight_decay="):
            continue
        settings = option_effects.variant(fields, base)
        config = LNGDConfig.from_optim_args(settings.fields)
        default = LNGDConfig.from_optim_args(fields)
        assert settings.lr == pytest.approx(factor * base.lr, rel=1e-2)
        if factor != 1:
            assert config.fallback_lr == pytest.approx(3 * base.lr)
            assert settings.lr * config.weight_decay_scale == pytest.approx(15 * base.lr, rel=1e-2)
            assert replace(config, fallback_lr=None, weight_decay_scale=default.weight_decay_scale) == default
        else:
            assert config == default


@pytest.mark.parametrize("fields", sorted(option_effects.VARIANTS))
def test_every_variant_is_a_valid_config(fields: str) -> None:
    settings = option_effects.variant(fields, Settings(1e-2, 1e-2, 0.4))
    LNGDConfig.from_optim_args(settings.fields)
    assert settings.lr > 0


@pytest.mark.parametrize("model", ["marian", "resnet"])
def test_step_times_are_rows(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "small", lambda: step_time.marian(16, 16, 2, 1, 8_000))
    monkeypatch.setattr(step_time, "transformer_big", lambda: step_time.marian(16, 16, 2, 1, 100))
    monkeypatch.setattr(step_time, "BATCH", 2)
    monkeypatch.setattr(step_time, "IMAGES", 2)
    threads = torch.get_num_threads()
    step_time.main(["--model", model, "--rounds", "2", "--warmup", "1", "--results", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    targets = step_time.TARGETS if model == "marian" else step_time.IMAGE_TARGETS
    assert [(row["optimizer"], row["reference"]) for row in result["timings"]] == [t[:2] for t in targets]
    assert len(result["memory"]) == (8 if model == "marian" else 0)


def test_patch_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_memory, "IMAGES", 2)
    threads = torch.get_num_threads()
    patch_memory.main(["--rounds", "1", "--results", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["largest_mib"] < rows[-1]["largest_mib"]


def test_the_papers_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = runs.Results(tmp_path / "cifar10-resnet.json")
    for name, half, last, seconds in (
        ("sgd", 0.4, 0.6, 10.0),
        ("adamw", 0.3, 0.5, 12.0),
        ("lngd-paper", 0.2, 0.45, 8.0),
    ):
        row = row_of(name, 1, [(50, seconds / 2, 2.0), (100, seconds, 1.0)])
        curve = [(50, seconds / 2, half), (100, seconds, last)]
        results.add({**row, "accuracy": last, "accuracy_curve": curve})
    paper_tables.main(["--results", str(tmp_path)])
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in capsys.readouterr().out.splitlines():
        title = line.strip("*") if line.startswith("**") else title
        if line.startswith("| ") and not line.startswith(("| paper", "| ---")):
            found.setdefault(title, []).append([cell.strip() for cell in line.split("|")[1:-1]])
    seconds = {row[0]: row[2:] for row in found["Table 1, CIFAR-10, ResNet-18: seconds to 91 %"]}
    # AdamW ends at 50 %: SGD is there half way through its second half, the paper's LNGD never.
    assert seconds["SGD"] == ["3", "SGD + AdamW: 7.5", "1", "no"]
    assert seconds["Adam"] == ["2", "AdamW (two rates): 12.0", "2", "yes"]
    assert seconds["LNGD"] == ["1", "LNGD, the paper's: never", "3", "no"]
    assert seconds["KFAC"][0] == "–" and seconds["KFAC"][1].endswith("not run")
    best = {row[0]: row[2:] for row in found["Table 6, CIFAR-10, ResNet-18: best accuracy"]}
    assert best["SGD"] == ["3", "SGD + AdamW: 60.0", "1", "no"]
    assert len(found) == len(paper_tables.STUDIES)
    written = (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert (
        all(f"**{title}**" in written for title in found)
        and "| SGD | 268.7 s | 3 | SGD + AdamW: 7.5 | 1 | no |" in written
    )
    assert not list(tmp_path.glob("*.png"))  # two of the ablation's variants are missing
    for name in ("lngd-lr", "lngd-sample"):
        results.add({**results.rows[-1], "optimizer": name})
    paper_tables.main(["--results", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("*.png")] == ["ablation-cifar10-resnet.png"]


def test_places_of_losses_and_of_what_is_never_reached(tmp_path: Path) -> None:
    assert paper_tables.places({"a": 2.0, "b": math.inf, "c": 1.0}, False) == {"a": "2", "b": "3", "c": "1"}
    assert paper_tables.places({"a": math.inf, "b": math.inf, "c": 1.0}, False) == {"a": "–", "b": "–", "c": "1"}
    assert paper_tables.places({"a": 2.0, "b": 1.0}, True) == {"a": "1", "b": "2"}
    results = runs.Results(tmp_path / "multi30k.json")
    for name, loss in (("adamw", 3.0), ("sgd", 2.0), ("kfac", 4.0)):
        results.add(row_of(name, 1, [(50, 5.0, 5.0), (100, 10.0, loss)]))
    (study,) = (s for s in paper_tables.STUDIES if s.unit == "BLEU")
    lines = paper_tables.study_table(study, results, str).splitlines()
    assert "| SGD | 31.87 BLEU | 3 | sgd: 2.000 | 1 | no |" in lines  # the lowest loss is the best
    assert "| Adam | 33.05 BLEU | 2 | adamw: 3.000 | 2 | yes |" in lines


def test_compiled_and_other_steps_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tiny(*_: int) -> torch.nn.Module:
        return core_marian(encoder_layers=1, decoder_layers=1).float()

    core_forget_watchers()
    monkeypatch.setattr(compile_time, "marian", tiny)
    monkeypatch.setattr(compile_time, "VOCABULARY", 40)
    compile_time.main(["--rounds", "10", "--backend", "eager", "--results", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["graphs"] >= 1 and len(result["rows"]) == 4
    assert {(row["optimizer"], row["compiled"]) for row in result["rows"]} >= {("lngd", "eager"), ("adamw", None)}
    assert all(row["watched"] > 0 and row["others"] > 0 for row in result["rows"])
    torch._dynamo.reset()


def test_the_committed_table_of_precisions_is_the_tests() -> None:
    rows = json.loads((precision.RESULTS / "precision.json").read_text(encoding="utf-8"))
    assert len(rows) == 48 and precision.text_of(rows) in (precision.RESULTS / "precision.md").read_text("utf-8")


def test_errors_of_halved_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding moves factors and directions a little, and half the bytes of the factors are left."""
    monkeypatch.setattr(factor_dtype, "STEPS", 2)
    found = factor_dtype.measure({"damping_rho": 0.3})
    halved, whole = found[factor_dtype.RANDOM], found[factor_dtype.PRODUCTS]
    assert 0 < halved["factors"]["median"] <= halved["factors"]["greatest"] < 0.02 and halved["failed_inverses"] == 0
    assert 0 < halved["direction"]["median"] < 0.2
    assert whole["factors"]["greatest"] < 1e-4 < whole["direction"]["greatest"]  # products alone were rounded
    assert halved["bytes"]["factors"] < 0.6 * whole["bytes"]["factors"]


def test_the_distance_between_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariance, "LAYOUTS", [(1, 2)])
    assert 0 <= invariance.worst({}, "images", invariance.EXACT, "float64") < 1e-9
    assert invariance.worst({}, "images", invariance.HALF, "float32") > 1e-6  # products in bfloat16 round otherwise


def test_what_a_rank_keeps_and_sends(tmp_path: Path) -> None:
    pool = DistPool(2, tmp_path, "benchmarks.sharding")
    found = pool.run(sharding.measure)
    pool.close()
    assert len(found) == 2 and all(0 < own["step"] < own["factor_step"] for own in found)
    assert all(own["state"]["total"] < 0.7 * sum(o["state"]["total"] for o in found) for own in found)
