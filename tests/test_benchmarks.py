"""The comparison itself: rivals are tuned alike, runs are paired and resumed, tables say what the rows say."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import (
    cifar10_tasks,
    compare,
    multi30k_task,
    option_effects,
    patch_memory,
    runs,
    step_time,
    sweep_lr,
    tables,
)
from benchmarks.rivals import RIVALS, Settings, label, rival, split
from benchmarks.step_time import compare as paired
from hf_lngd import LNGDConfig

WORDS = ["red", "dog", "man", "sees", "two", "balls", "on", "grass", "girl", "runs", "park", "boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task in Multi30k's format."""
    folder = tmp_path_factory.mktemp("multi30k")
    for part, count in (("train", 192), ("validation", 24)):
        with gzip.open(folder / f"{part}.json.gz", "wt", encoding="utf-8") as file:
            for number in range(count):
                words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 3 + number % 5)]
                pair = {"en": " ".join(words), "de": " ".join(word[::-1] for word in words)}
                file.write(json.dumps({"translation": pair}) + "\n")
    return folder


def losses(best_lr: float, best_other: float) -> Callable[[Settings], float]:
    """A bowl over the logarithms of both rates."""
    return lambda s: math.log(s.lr / best_lr) ** 2 + math.log(s.other_lr / best_other) ** 2


@pytest.mark.parametrize("trials", [1, 4, 8, 14])
def test_every_search_has_as_many_trials(trials: int) -> None:
    for start in [*multi30k_task.STARTS.values(), *cifar10_tasks.STARTS.values()]:
        tried = list(runs.search(start, trials, losses(1e-3, 3e-2)))
        assert len(tried) == len({runs.place(settings) for settings in tried}) == trials
        assert tried[0] == start


def test_the_search_finds_a_minimum() -> None:
    loss_of = losses(2e-3, 3e-2)
    tried = list(runs.search(Settings(8e-3, 1e-2), 24, loss_of))
    best = min(tried, key=loss_of)
    assert 1.4e-3 < best.lr < 2.9e-3 and 2e-2 < best.other_lr < 4.4e-2


def test_the_search_leaves_diverged_settings() -> None:
    def loss_of(settings: Settings) -> float:
        return math.inf if settings.lr > 9e-3 else settings.lr

    assert min(runs.search(Settings(8e-3, 1e-2), 8, loss_of), key=loss_of).lr < 8e-3


def test_the_search_keeps_momentum_above_zero() -> None:
    assert all(0 < s.fresh < 1 for s in runs.search(Settings(8e-3, 1e-2, 0.4), 20, lambda s: -s.fresh))


def test_schedule() -> None:
    assert runs.schedule(0, 300, 60) == pytest.approx(1 / 60)
    assert runs.schedule(59, 300, 60) == runs.schedule(60, 300, 60) == 1
    assert runs.schedule(180, 300, 60) == pytest.approx(1 - 0.95 / 2)
    assert runs.schedule(300, 300, 60) == pytest.approx(0.05)
    assert runs.schedule(24, 75, 60) == 1


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_owns_each_parameter_once(name: str) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    model = multi30k_task.make_model(0)
    matrices, embeddings, rest = split(model)
    assert len(matrices) == 32 and len(embeddings) == 1
    optimizer = rival(name)(model, Settings(1e-3, 2e-3, weight_decay=0.3))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place = parameter.data_ptr()  # Muon's are views
            assert place not in rates
            rates[place], decays[place] = group["lr"], group["weight_decay"]
    optimizer.close()
    for members, rate, decay in ((matrices, 1e-3, 0.3), (embeddings, 2e-3, 0.3), (rest, 2e-3, 0.0)):
        assert {rates[p.data_ptr()] for p in members} == {rate}
        assert {decays[p.data_ptr()] for p in members} == {decay}


def test_runs_of_one_seed_are_paired(folder: Path) -> None:
    data = multi30k_task.prepare(folder)
    first, second = multi30k_task.batches(data, 3), multi30k_task.batches(data, 3)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(next(first).values(), next(second).values(), strict=True))
    one, other = multi30k_task.make_model(3), multi30k_task.make_model(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_padding_is_left_out_of_the_validation_loss(folder: Path) -> None:
    data = multi30k_task.prepare(folder)
    model = multi30k_task.make_model(0).eval()
    rows = [(b["input_ids"][i], b["labels"][i]) for b in data.validation for i in range(len(b["labels"]))]
    alone = [
        multi30k_task.collate([([t for t in source.tolist() if t], [t for t in target.tolist() if t != -100])])
        for source, target in rows
    ]
    by_row = multi30k_task.validation_loss(model, multi30k_task.Data(data.train, alone))
    assert multi30k_task.validation_loss(model, data) == pytest.approx(by_row, rel=1e-5)


def test_tune_report_resume_and_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    common = ["--data", str(folder), "--results", str(file), "--rivals", "adamw", "lngd", "--steps", "8", "12"]
    common += ["--threads", "1", "--trials", "2", "--seeds", "1", "2"]
    threads = torch.get_num_threads()
    compare.main([*common, "--tune"])
    compare.main([*common, "--report"])
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["optimizer"] for row in rows if row["phase"] == "tune"] == ["adamw", "lngd"] * 2
    order = [(row["seed"], row["steps"], row["optimizer"]) for row in rows if row["phase"] == "report"]
    assert order[:4] == [(1, 12, "adamw"), (1, 12, "lngd"), (1, 8, "adamw"), (1, 8, "lngd")]
    assert order[4:] == [(2, 12, "lngd"), (2, 12, "adamw"), (2, 8, "lngd"), (2, 8, "adamw")]
    for row in rows:
        assert [point[0] for point in row["validation_curve"]][-1] == row["steps"]
        assert row["loss"] == row["validation_curve"][-1][2] and not row["diverged"]
    # An interrupted study: the last two rows are lost, and only they are run again.
    file.write_text(json.dumps(rows[:-2]), encoding="utf-8")
    compare.main([*common, "--tune", "--report", "--plot"])
    again = json.loads(file.read_text(encoding="utf-8"))
    assert again[:-2] == rows[:-2] and len(again) == len(rows)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "| LNGD |" in capsys.readouterr().out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few random images in CIFAR-10's format, and a tiny pretrained model."""
    folder, draw = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 12)):
        pixels = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"img": pixels, "label": [int(n) for n in draw.integers(0, 10, count)]}
        features = Features({"img": ImageFeature(), "label": Value("int64")})
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}-0.parquet")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=16)).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("task", ["cifar10-resnet", "cifar10-vit", "cifar10-efficientnet"])
def test_image_tasks(task: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_tasks, "TRAIN", 24)
    monkeypatch.setattr(cifar10_tasks, "HELD_OUT", 12)
    cifar10_tasks.load.cache_clear()
    arguments = ["--task", task, "--data", str(images), "--model", str(images / "model"), "--threads", "1"]
    arguments += ["--results", str(tmp_path / "r.json"), "--rivals", "adamw", "muon", "lngd", "--steps", "8"]
    threads = torch.get_num_threads()
    compare.main([*arguments, "--trials", "1", "--seeds", "1", "--tune", "--report", "--plot"])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(rows) == 6 and {row["task"] for row in rows} == {task}
    assert all(0 <= row["accuracy"] <= 1 and len(row["accuracy_curve"]) == 4 for row in rows)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    cifar10_tasks.load.cache_clear()


def test_augmented_images_are_windows_of_the_image_in_its_border() -> None:
    x = torch.arange(1, 33 * 32 + 1, dtype=torch.int32)[: 32 * 32].view(1, 1, 32, 32).repeat(64, 3, 1, 1)
    out = cifar10_tasks.augment(x, torch.Generator().manual_seed(0))
    border = torch.nn.functional.pad(x[0], (4,) * 4)
    windows = [border[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    kinds = [next(k for k, w in enumerate(windows + [w.flip(-1) for w in windows]) if torch.equal(w, o)) for o in out]
    assert 20 < sum(kind >= 81 for kind in kinds) < 44 and len(set(kinds)) > 30


def test_flat_muon_is_muon_on_matrices() -> None:
    torch.manual_seed(0)
    conv, flat = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Linear(27, 4, bias=False)
    flat.weight.data.copy_(conv.weight.data.view(4, 27))
    grad = torch.randn(4, 27)
    for layer in (conv, flat):
        optimizer = rival("muon")(layer, Settings(1e-2, 1e-2)).optimizers[0]
        layer.weight.grad = grad.view(layer.weight.shape).clone()
        optimizer.step()
    assert torch.equal(conv.weight.view(4, 27), flat.weight)


def test_a_diverged_run_is_a_row(folder: Path) -> None:
    row = runs.train("adamw", Settings(1e4, 1e4), 0, 8, multi30k_task.make_task(folder), lambda step, loss: None)
    assert row["diverged"] and row["loss"] is None
    json.dumps(row)


def row_of(name: str, seed: int, curve: list[tuple[int, float, float]], phase: str = "report") -> runs.Row:
    """A row as a run would leave it."""
    diverged = curve[-1][2] is None
    return {
        "phase": phase,
        "optimizer": name,
        "seed": seed,
        "settings": Settings(1e-3, 1e-2).to_dict(),
        "steps": curve[-1][0],
        "seconds": curve[-1][1],
        "loss": curve[-1][2],
        "diverged": diverged,
        "train_curve": curve,
        "validation_curve": curve,
        "state_mib": 1.0,
    }


def test_time_to() -> None:
    curve = [(10.0, 5.0), (20.0, 4.0), (30.0, 3.5)]
    assert tables.time_to(curve, 4.5) == pytest.approx(15)
    assert tables.time_to(curve, 3.5) == pytest.approx(30)
    assert tables.time_to(curve, 6.0) == 10
    assert tables.time_to(curve, 3.0) is None


def test_results_table(tmp_path: Path) -> None:
    results = runs.Results(tmp_path / "r.json")
    for seed in (1, 2):
        results.add(row_of("adamw", seed, [(50, 10.0, 5.0), (100, 20.0, 4.0 + seed / 10)]))
        results.add(row_of("lngd", seed, [(50, 12.0, 4.5 + seed / 10), (100, 24.0, 3.5 + seed / 10)]))
    results.add(row_of("muon", 1, [(50, 11.0, 5.0), (100, 22.0, None)]))  # type: ignore[list-item]
    lines = tables.results_table(results, ["adamw", "muon", "lngd"], label).splitlines()
    adamw, muon, lngd = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert adamw[1:4] == ["4.150 ± 0.071", "20.0 ± 0.0", "20.0"]
    assert lngd[1:4] == ["3.650 ± 0.071", "24.0 ± 0.0", "18.0"]
    assert muon[1:4] == ["–", "–", "never"] and muon[-2:] == ["0", "1"]


def test_the_best_settings_are_the_best_over_tuning_seeds(tmp_path: Path) -> None:
    results = runs.Results(tmp_path / "r.json")
    for rate, values in ((1e-3, (3.0, 3.6)), (2e-3, (3.2, 3.2)), (4e-3, (2.9, None))):
        for seed, loss in enumerate(values):
            row = row_of("lngd", seed, [(10, 1.0, loss)], "tune")  # type: ignore[list-item]
            results.add({**row, "settings": Settings(rate, 1e-2).to_dict()})
    assert results.best("lngd").lr == 2e-3
    with pytest.raises(ValueError, match="no tuning run of soap"):
        results.best("soap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "adam"], "--rivals: got 'adam'"),
        (["--task", "mnist"], "--task: got 'mnist'"),
        (["--tune", "--task", "cifar10-resnet", "--data", "no-such-folder"], "--data: no-such-folder has no train"),
        (["--tune", "--task", "cifar10-efficientnet", "--data", "x"], "--model: got none"),
        (["--report", "--seeds", "101", "--data", "x"], "--seeds: "),
        (["--tune"], "--data: "),
        (["--trials", "0"], "--trials: got 0"),
        (["--steps", "3"], "--steps: got 3"),
        (["--fields", "muon:a=b"], "--fields: got 'muon:a=b'"),
        (["--tune", "--data", "no-such-folder"], "--data: no-such-folder has no train.json.gz"),
        (["--plot"], "no reported runs"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare.main([*arguments, "--results", str(tmp_path / "none.json")])


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


def test_option_effects_run_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = runs.Results(tmp_path / "tuned.json")
    results.add(row_of("lngd", 101, [(10, 1.0, 3.0)], "tune"))
    arguments = ["--data", str(folder), "--tuned", str(tmp_path / "tuned.json"), "--steps", "8"]
    arguments += ["--results", str(tmp_path / "options.json"), "--part", "0", str(len(option_effects.TRANSLATION) // 2)]
    threads = torch.get_num_threads()
    option_effects.main(arguments)
    option_effects.main(arguments)
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    chosen = list(option_effects.TRANSLATION)[:: len(option_effects.TRANSLATION) // 2]
    assert [row["settings"]["fields"] for row in rows] == chosen and chosen[0] == ""
    assert "| nothing (the default) |" in capsys.readouterr().out


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
