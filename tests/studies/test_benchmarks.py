"""The benchmarks beside the comparison: what they measure is counted right, and bad arguments are named."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from study_helpers import row_of, write_multi30k

from benchmarks.cost import cases, compile_time, parallel, patch_memory, precision, step_time
from benchmarks.cost.processes import on_ranks
from benchmarks.cost.step_time import compare as paired
from benchmarks.report import paper_tables
from benchmarks.studies import invariance, option_effects, runs, spec, sweep_lr
from benchmarks.studies.rivals import Settings
from benchmarks.tasks.registry import TASKS
from benchmarks.tasks.task import Task
from hf_lngd import LNGDConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task in Multi30k's format."""
    return write_multi30k(tmp_path_factory.mktemp("multi30k"))


def test_bad_arguments_of_the_other_benchmarks_are_named(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="--threads: got 0"):
        sweep_lr.main(["--data", str(folder), "--threads", "0"])
    threads = torch.get_num_threads()
    for _ in range(2):
        sweep_lr.main([*arguments, "--rates", "1e-3"])
    torch.set_num_threads(threads)
    results = runs.Results(tmp_path / "sweep.json")
    assert len(results.rows) == len(sweep_lr.FRESH)
    assert "0.001" in sweep_lr.sweep_table(results, "multi30k", 8)
    assert "0.001" not in sweep_lr.sweep_table(results, "cifar10-vit", 8)
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
    variants = option_effects.variants_of("multi30k")
    every = len(variants) // 2
    arguments = ["--data", str(folder), "--tuned", str(tmp_path / "tuned.json"), "--steps", "8"]
    arguments += ["--results", str(tmp_path / "options.json"), "--part", "0", str(every)]
    threads = torch.get_num_threads()
    option_effects.main(arguments)
    option_effects.main(arguments)
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    chosen, base = list(variants)[::every], results.best("lngd-same")
    expected = [option_effects.variant(name, variants[name], base).to_dict() for name in chosen]
    assert [row["settings"] for row in rows] == expected
    assert rows[0]["settings"] == base.to_dict() and chosen[0] == ""
    assert "| nothing (the default) |" in capsys.readouterr().out


def test_given_variants_run_on_several_seeds_of_an_untuned_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "tatoeba", "--data", str(folder), "--tuned", str(tmp_path / "none.json"), "--steps", "8"]
    arguments += ["--results", str(tmp_path / "options.json"), "--seeds", "1", "2", "--variants"]
    threads = torch.get_num_threads()
    option_effects.main([*arguments, r"damping=0.1,exclude=a{1\,2}", "weight_decay=0.3,momentum=0.9"])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    start = spec.named("tatoeba").rivals[option_effects.DEFAULT].start
    assert [row["seed"] for row in rows] == [1] * 3 + [2] * 3 and {row["task"] for row in rows} == {"tatoeba"}
    assert [row["settings"] for row in rows[:3]] == [
        replace(start, **changes).to_dict()
        for changes in (
            {},
            {"fields": r"damping=0.1,exclude=a{1\,2}"},
            {"weight_decay": 0.3, "fields": "momentum=0.9"},
        )
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    gaps = [rows[i + 1]["loss"] - rows[i]["loss"] for i in (0, 3)]
    assert f"{sum(gaps) / 2:+.3f} ± " in lines[0] and len(lines) == 2


def test_diverged_variants_and_images_in_the_table(tmp_path: Path) -> None:
    base, results = Settings(1e-3, None), runs.Results(tmp_path / "options.json")
    for fields, losses in (("", (1.0, 1.2)), ("momentum=0.9", (1.1, 1.2)), ("bias=factor", (1.1, None))):
        for seed, loss in enumerate(losses):
            row = row_of("lngd", seed, [(10, 1.0, loss)], "option")  # type: ignore[list-item]
            results.add({**row, "settings": replace(base, fields=fields).to_dict(), "accuracy": 0.5})
    lines = option_effects.effects(
        results, base, [0, 1], dict.fromkeys(["", "momentum=0.9", "bias=factor", "seed=1"], 1.0), 10
    ).splitlines()
    assert lines[2:] == [
        "| nothing (the default) | 0.001 | 1.100 ± 0.141 | 50.0 ± 0.0 |  |",
        "| `momentum=0.9` | 0.001 | 1.150 ± 0.071 | 50.0 ± 0.0 | +0.050 ± 0.071 |",
        "| `bias=factor` | 0.001 | - | - | diverged |",
    ]


def test_option_effects_go_on_at_the_settings_of_their_first_row(tmp_path: Path) -> None:
    """Parts run in any order: a variant's row, at a rate of its own, is not what the others are compared with."""
    tuned, results, study = (
        runs.Results(tmp_path / "tuned.json"), runs.Results(tmp_path / "options.json"), spec.named("multi30k")
    )  # fmt: skip
    assert option_effects.base_of(results, tuned.path, study) == study.rivals["lngd-same"].start
    tuned.add(row_of("lngd-same", 101, [(10, 1.0, 3.0)], "tune"))
    best = Settings(**tuned.rows[0]["settings"])
    assert option_effects.base_of(results, tuned.path, study) == best
    natural = option_effects.variant("direction=natural,damping=0.3", 0.25, best)
    for settings in (natural, replace(best, weight_decay=0.3)):
        results.add({**row_of("lngd", 11, [(10, 1.0, 3.0)], "option"), "settings": settings.to_dict()})
    with pytest.raises(ValueError, match="options.json: has no row of the default"):
        option_effects.base_of(results, tuned.path, study)
    first = Settings(7e-3, 1e-2, 0.4)
    results.add({**row_of("lngd", 11, [(10, 1.0, 3.0)], "option"), "settings": first.to_dict()})
    assert option_effects.base_of(results, tuned.path, study) == first  # whatever the study has found since


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mnist", "--table"], "--task: got 'mnist', accepted: multi30k, tatoeba, cifar10-resnet"),
        (["--part", "2", "2", "--table"], "--part: got 2 2, accepted: I N"),
        (["--part", "0", "0", "--table"], "--part: got 0 0, accepted: I N"),
        (["--part", "-1", "2", "--table"], "--part: got -1 2, accepted: I N"),
        (["--lr", "0", "--table"], "--lr: got 0.0, accepted: a rate above 0"),
        ([], "--data: needed to run anything"),
        (["--data", "x", "--threads", "0"], "--threads: got 0"),
        (["--table", "--variants", "dampign_rho=1"], "dampign_rho"),
        (["--table", "--variants", "weight_decay=-1"], "weight_decay"),
        (["--task", "marian-wmt", "--data", "x"], "--model: got none"),
    ],
)
def test_bad_arguments_of_option_effects_are_named(arguments: list[str], message: str) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=message):
        option_effects.main(arguments)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
def test_a_variant_of_another_size_changes_that_alone(task: str) -> None:
    base, users = Settings(2e-3, None, 0.2), LNGDConfig()
    for fields, factor in option_effects.variants_of(task).items():
        settings = option_effects.variant(fields, factor, base)
        config, default = LNGDConfig.from_optim_args(settings.fields), LNGDConfig.from_optim_args(fields)
        assert settings.lr == pytest.approx(factor * base.lr, rel=1e-2)
        if factor != 1:
            scales = {name: getattr(default, name) for name in ("fallback_lr_scale",)}
            for name in scales:
                assert settings.lr * getattr(config, name) == pytest.approx(base.lr * getattr(users, name), rel=1e-2)
            assert replace(config, **scales) == default
        elif fields.startswith("weight_decay="):
            assert settings == replace(base, weight_decay=default.weight_decay)
        else:
            assert config == default


@pytest.mark.parametrize("model", ["marian", "resnet"])
def test_step_times_are_rows(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, step_time):
        monkeypatch.setattr(module, "small", lambda: cases.marian(16, 16, 2, 1, 8_000))
    monkeypatch.setattr(step_time, "transformer_big", lambda: cases.marian(16, 16, 2, 1, 100))
    monkeypatch.setattr(cases, "BATCH", 2)
    monkeypatch.setattr(cases, "IMAGES", 2)
    threads = torch.get_num_threads()
    step_time.main(["--model", model, "--rounds", "2", "--warmup", "1", "--results", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    targets = step_time.TARGETS if model == "marian" else step_time.IMAGE_TARGETS
    assert [(row["optimizer"], row["reference"]) for row in result["timings"]] == [t[:2] for t in targets]
    assert len(result["memory"]) == (6 if model == "marian" else 0)


def test_patch_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_memory, "IMAGES", 2)
    threads = torch.get_num_threads()
    patch_memory.main(["--rounds", "1", "--results", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert [row["statistics"] for row in rows] == [False, True]
    assert rows[0]["largest_mib"] < rows[1]["largest_mib"]


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
    gc.collect()  # optimizers that other tests have left behind hold torch.compile back
    small = cases.marian(16, 16, 2, 1, 40).state_dict()

    def made(*_: int) -> torch.nn.Module:
        model = cases.marian(16, 16, 2, 1, 40)
        model.load_state_dict(small)
        return model

    monkeypatch.setattr(compile_time, "marian", made)
    monkeypatch.setattr(compile_time, "VOCABULARY", 40)
    threads = torch.get_num_threads()
    compile_time.main(["--rounds", "10", "--backend", "eager", "--results", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["graphs"] >= 1 and len(result["rows"]) == 4
    assert {(row["optimizer"], row["compiled"]) for row in result["rows"]} >= {("lngd", "eager"), ("adamw", None)}
    assert all(row["watched"] > 0 and row["others"] > 0 for row in result["rows"])
    torch._dynamo.reset()


def test_precision_of_factors() -> None:
    rows = json.loads((precision.RESULTS / "precision.json").read_text(encoding="utf-8"))
    assert len(rows) == 48 and precision.text_of(rows) in (precision.RESULTS / "precision.md").read_text("utf-8")
    plain, rate, left_out = precision.factors("Marian", precision.FULL, 1, "off", precision.GRADIENTS)
    assert rate > 0 and left_out == 0
    halved, _, left_out = precision.factors("Marian", precision.FP16_AUTOCAST, 2, "off", precision.GRADIENTS)
    assert 1e-5 < precision.gap(halved, plain) < 0.05 and left_out > 0


def test_the_distance_between_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariance, "LAYOUTS", [(1, 2), (2, 1)])
    assert 0 <= invariance.worst("marian", {}, "float64", 3) < 1e-9
    assert [sum(map(sum, invariance.sizes_of(*layout))) for layout in ((1, 2), (2, 2), (4, 2), (2, 4))] == [16] * 4
    start, end = invariance.train("images", invariance.PAPER, "float32", 1, 1, 3)
    assert invariance.distance(end, end, start) == 0 and invariance.distance(start, end, start) == pytest.approx(1)


@pytest.mark.parametrize("layout", list(parallel.FILES))
def test_what_a_rank_keeps_and_sends(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "r.json"
    parallel.main(["--layout", layout, "--ranks", "1", "2", "--steps", "4", "--results", str(file)])
    torch.set_num_threads(threads)
    found = json.loads(file.read_text(encoding="utf-8"))["ranks"]
    assert [own["factor_step"] for own in found["1"]] == [0] and len(found["2"]) == 2
    assert all(own["step"] < own["factor_step"] for own in found["2"])
    if layout == "fsdp2":
        whole = sum(own["state"]["total"] for own in found["2"])
        assert all(own["state"]["total"] < 0.7 * whole and own["step"] > 0 for own in found["2"])
        assert max(own["flops"]["step"] for own in found["2"]) < 0.7 * found["1"][0]["flops"]["step"]
    with pytest.raises(ValueError, match="--steps: got 1"):
        parallel.main(["--steps", "1"])


def test_a_failure_on_a_rank_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        on_ranks(2, divmod, 1, 0)
