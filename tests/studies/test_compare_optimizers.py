"""The comparison of optimizers: alike searches, paired runs, resumed studies, tables that can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from study_helpers import row_of, study, write_multi30k
from transformers import AutoTokenizer, MarianConfig, MarianMTModel, ViTConfig, ViTForImageClassification

from benchmarks.report import tables
from benchmarks.studies import compare_optimizers, runs, spec
from benchmarks.studies.rivals import MUON_SCALE, RIVALS, Settings, split
from benchmarks.tasks import cifar10, fine_tuning, translation
from benchmarks.tasks.registry import TASKS, load_task
from hf_lngd import LNGDConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny task in Multi30k's format."""
    return write_multi30k(tmp_path_factory.mktemp("multi30k"))


def losses(best_lr: float, best_other: float) -> Callable[[Settings], float]:
    """A bowl over the logarithms of both rates."""
    return lambda s: math.log(s.lr / best_lr) ** 2 + math.log(s.rest / best_other) ** 2


@pytest.mark.parametrize("trials", [1, 4, 8, 12])
def test_every_search_has_as_many_trials(trials: int) -> None:
    starts = {e.start: e.tuned for name in TASKS for e in spec.named(name).rivals.values()}
    for start, tuned in starts.items():
        tried = list(runs.search(start, trials, losses(1e-3, 3e-2), tuned))
        wanted = trials if tuned else 1  # a rival that takes its settings from another one's search
        assert len(tried) == len({runs.place(settings) for settings in tried}) == wanted
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


def test_shorter_runs_have_the_same_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = spec.read(study(tmp_path / "s.toml", steps=300, warmup=60))
    assert [read.warmup_of(steps) for steps in (300, 225, 150, 75, 1)] == [60, 45, 30, 15, 1]
    seen = []

    def train(*args: Any, **_: Any) -> runs.Row:
        seen.append(args[3:5])
        return row_of("lngd", 1, [(args[3], 1.0, 2.0)])

    monkeypatch.setattr(compare_optimizers, "train", train)
    runner = compare_optimizers.Runner(runs.Results(tmp_path / "r.json"), None, read, 1)  # type: ignore[arg-type]
    for steps in (300, 150):
        runner.run("report", "lngd", Settings(1e-2, 1e-2), 1, steps)
    assert seen == [(300, 60), (150, 30)]


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_owns_each_parameter_once(name: str) -> None:
    if name in ("soap", "shampoo"):
        pytest.importorskip("pytorch_optimizer")
    model = translation.make_model(0)
    matrices, embeddings, rest = split(model)
    assert len(matrices) == 32 and len(embeddings) == 1
    optimizer = RIVALS[name](model, Settings(1e-3, 2e-3, weight_decay=0.3))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place = parameter.data_ptr()  # Muon's are views
            assert place not in rates
            rates[place], decays[place] = group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"]
    optimizer.close()
    for members, rate, decay in ((matrices, 1e-3, 0.3), (embeddings, 2e-3, 0.3), (rest, 2e-3, 0.0)):
        assert {rates[p.data_ptr()] for p in members} == {rate}
        assert {decays[p.data_ptr()] for p in members} == {decay}


def test_runs_of_one_seed_are_paired(folder: Path) -> None:
    data = translation.prepare(folder)
    first, second = translation.batches(data, 3), translation.batches(data, 3)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(next(first).values(), next(second).values(), strict=True))
    one, other = translation.make_model(3), translation.make_model(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_token_of_the_paddings_number_is_seen() -> None:
    """The end of a sentence is 0 in the vocabularies of published Marians, as padding is in the task's own."""
    batch = translation.collate([([7, 0], [5, 0]), ([7, 8, 9, 0], [5])])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 0], [5, translation.IGNORED]]


def test_padding_is_left_out_of_the_validation_loss(folder: Path) -> None:
    data = translation.prepare(folder)
    model = translation.make_model(0).eval()
    rows = [(b["input_ids"][i], b["labels"][i]) for b in data.validation for i in range(len(b["labels"]))]
    alone = [
        translation.collate([([t for t in source.tolist() if t], [t for t in target.tolist() if t != -100])])
        for source, target in rows
    ]
    by_row = translation.validation_loss(model, translation.Data(data.train, alone))
    assert translation.validation_loss(model, data) == pytest.approx(by_row, rel=1e-5)


def test_tune_report_resume_and_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    common = [str(study(tmp_path / "s.toml")), "--data", str(folder), "--results", str(file)]
    threads = torch.get_num_threads()
    compare_optimizers.main([*common, "--phases", "tune"])
    compare_optimizers.main([*common, "--phases", "report"])
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["optimizer"] for row in rows if row["phase"] == "tune"] == ["adamw", "lngd"] * 2
    order = [(row["seed"], row["steps"], row["optimizer"]) for row in rows if row["phase"] == "report"]
    assert order[:4] == [(1, 12, "adamw"), (1, 12, "lngd"), (1, 8, "adamw"), (1, 8, "lngd")]
    assert order[4:] == [(2, 12, "lngd"), (2, 12, "adamw"), (2, 8, "lngd"), (2, 8, "adamw")]
    for row in rows:
        assert [point[0] for point in row["validation_curve"]][-1] == row["steps"]
        assert row["loss"] == row["validation_curve"][-1][2] and not row["diverged"]
        assert row["peak_mib"] is None or row["peak_mib"] > 50
    # An interrupted study: the last two rows are lost, and only they are run again.
    file.write_text(json.dumps(rows[:-2]), encoding="utf-8")
    compare_optimizers.main(common)
    again = json.loads(file.read_text(encoding="utf-8"))
    assert again[:-2] == rows[:-2] and len(again) == len(rows)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "| LNGD |" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_a_true_fisher_gets_its_second_pass(folder: Path) -> None:
    settings = Settings(1e-2, 1e-2, fields="preset=lngd_lr,factor_interval=4")
    row = runs.train("lngd", settings, 0, 8, 2, translation.make_task("multi30k", folder), lambda step, loss: None)
    assert math.isfinite(row["loss"]) and not row["diverged"]


def test_one_trial_is_a_row(folder: Path, tmp_path: Path) -> None:
    arguments = [
        str(study(tmp_path / "s.toml", steps=8, fractions=[])),
        "--data",
        str(folder),
        "--results",
        str(tmp_path / "r.json"),
    ]
    threads = torch.get_num_threads()
    compare_optimizers.main([*arguments, "--trial", "lr=1e-3,damping=0.5", "--trial", "rival=adamw,fresh=0.5"])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [(r["phase"], r["optimizer"], r["seed"]) for r in rows] == [("trial", n, 101) for n in ("lngd", "adamw")]
    assert [(r["settings"]["lr"], r["settings"]["fields"]) for r in rows] == [(1e-3, "damping=0.5"), (1e-2, "")]
    assert rows[1]["settings"]["fresh"] == 0.5


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
    monkeypatch.setattr(cifar10, "TRAIN", 24)
    monkeypatch.setattr(cifar10, "HELD_OUT", 12)
    cifar10.load.cache_clear()
    rates = "lr = 1e-2\nother_lr = 1e-2"
    changes = {"task": task, "steps": 8, "trials": 1, "seeds": [1], "fractions": []}
    path = study(tmp_path / "s.toml", rivals=dict.fromkeys(("adamw", "muon", "lngd"), rates), **changes)
    threads = torch.get_num_threads()
    arguments = ["--data", str(images), "--model", str(images / "model"), "--results", str(tmp_path / "r.json")]
    compare_optimizers.main([str(path), *arguments])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(rows) == 6 and {row["task"] for row in rows} == {task}
    assert all(0 <= row["accuracy"] <= 1 and len(row["accuracy_curve"]) == 4 for row in rows)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    cifar10.load.cache_clear()


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian with the bundled tokenizer, as `from_pretrained` reads them."""
    folder = tmp_path_factory.mktemp("marian")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "data" / "tatoeba-en-de" / "tokenizer")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    config = MarianConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16,
        eos_token_id=tokenizer.eos_token_id, forced_eos_token_id=None, **sizes, **ids
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", sorted(fine_tuning.PARTS))
def test_fine_tuning_tasks(task: str, marian: Path, tmp_path: Path) -> None:
    for number, part in enumerate(part for parts in fine_tuning.PARTS[task] for part in parts):
        write_multi30k(tmp_path / "data", {part: 16 + number})
    load_task(task, tmp_path / "data", marian)  # read once a process
    rates = "lr = 1e-2\nother_lr = 1e-2"
    changes = {"task": task, "steps": 8, "trials": 1, "seeds": [1], "fractions": []}
    path = study(tmp_path / "s.toml", rivals=dict.fromkeys(("adamw", "lngd"), rates), **changes)
    threads = torch.get_num_threads()
    arguments = ["--data", str(tmp_path / "data"), "--model", str(marian), "--results", str(tmp_path / "r.json")]
    compare_optimizers.main([str(path), *arguments])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert ["bleu" in row for row in rows] == [False, False, True, True]
    assert all(0 <= row["bleu"] <= 100 for row in rows[2:])
    fine_tuning.prepare.cache_clear()


def test_bleu_of_the_references_is_100(marian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(marian)
    model = MarianMTModel.from_pretrained(marian)
    pairs = [
        ("One two three four five.", "Eins zwei drei vier fünf."),
        ("Six seven eight nine.", "Sechs bis neun und so."),
    ]
    answers = dict(pairs)

    def generate(input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return tokenizer([answers[text] for text in texts], padding=True, return_tensors="pt")["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    assert fine_tuning.bleu(model, pairs, tokenizer)["bleu"] == pytest.approx(100)


def test_augmented_images_are_windows_of_the_image_in_its_border() -> None:
    x = torch.arange(1, 33 * 32 + 1, dtype=torch.int32)[: 32 * 32].view(1, 1, 32, 32).repeat(64, 3, 1, 1)
    out = cifar10.augment(x, torch.Generator().manual_seed(0))
    border = torch.nn.functional.pad(x[0], (4,) * 4)
    windows = [border[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    kinds = [next(k for k, w in enumerate(windows + [w.flip(-1) for w in windows]) if torch.equal(w, o)) for o in out]
    assert 20 < sum(kind >= 81 for kind in kinds) < 44 and len(set(kinds)) > 30


def test_lngd_with_two_rates_is_on_muons_scale_and_with_one_as_users_get_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    (two,) = RIVALS["lngd"](model, Settings(0.02, 0.01)).optimizers
    assert (two.config.rate_scale, two.config.weight_decay) == (MUON_SCALE, 0.1)
    assert {g["name"]: (g["lr"] * g["lr_scale"], g["weight_decay"]) for g in two.param_groups} == {
        "lngd": (0.02, 0.1),
        "fallback_no_decay": (0.01, 0.0),
    }
    (one,) = RIVALS["lngd"](model, Settings(1e-3, None)).optimizers
    users = LNGDConfig(momentum=0.9)
    rates = [g["lr"] * g["lr_scale"] for g in one.param_groups]
    assert one.config == users and rates == [1e-3, 1e-3 * users.fallback_lr_scale]


def test_flat_muon_is_muon_on_matrices() -> None:
    torch.manual_seed(0)
    conv, flat = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Linear(27, 4, bias=False)
    flat.weight.data.copy_(conv.weight.data.view(4, 27))
    grad = torch.randn(4, 27)
    for layer in (conv, flat):
        optimizer = RIVALS["muon"](layer, Settings(1e-2, 1e-2)).optimizers[0]
        layer.weight.grad = grad.view(layer.weight.shape).clone()
        optimizer.step()
    assert torch.equal(conv.weight.view(4, 27), flat.weight)


def test_a_diverged_run_is_a_row(folder: Path) -> None:
    task = translation.make_task("multi30k", folder)
    row = runs.train("adamw", Settings(1e4, 1e4), 0, 8, 2, task, lambda step, loss: None)
    assert row["diverged"] and row["loss"] is None
    json.dumps(row)


def test_a_study_that_goes_on_another_day_runs_adamw_once_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of that day are scaled by it; it is no reported run, and nothing missing means nothing run."""
    file, threads = tmp_path / "r.json", torch.get_num_threads()
    spec = study(tmp_path / "s.toml", steps=8, trials=1, fractions=[])
    common = [str(spec), "--data", str(folder), "--results", str(file)]
    here = runs.clock_here()

    def go_on(date: str, *dropped: tuple[str, str, int]) -> list[tuple[str, str, int, str]]:
        monkeypatch.setattr(runs, "clock_here", lambda: {**here, "clock": "cpu", "day": date})
        monkeypatch.setattr(compare_optimizers, "clock_here", runs.clock_here)
        if file.exists():
            rows = json.loads(file.read_text(encoding="utf-8"))
            kept = [row for row in rows if (row["phase"], row["optimizer"], row["seed"]) not in dropped]
            file.write_text(json.dumps(kept), encoding="utf-8")
        compare_optimizers.main([*common, "--phases", "tune", "report"])
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [(r["phase"], r["optimizer"], r["seed"], r["day"]) for r in rows if r["phase"] != "tune"]

    first = go_on("one")
    alone = [*common[:-1], str(tmp_path / "alone.json")]
    compare_optimizers.main([*alone, "--phases", "tune"])
    compare_optimizers.main([*alone, "--phases", "report", "--rivals", "lngd"])  # AdamW has no run at all yet
    assert [r["optimizer"] for r in json.loads((tmp_path / "alone.json").read_text()) if r["phase"] == "clock"] == [
        "adamw"
    ]
    assert {row[0] for row in first} == {"report"} and len(first) == 4
    assert go_on("two") == first
    assert sorted(go_on("one", ("report", "lngd", 2))) == sorted(first)  # on the day of the others
    missing = ("report", "lngd", 2)
    second = go_on("two", missing)
    assert second[-2:] == [("clock", "adamw", 1, "two"), (*missing, "two")] and len(second) == 5
    third = go_on("three", missing)
    assert third[-2:] == [("clock", "adamw", 1, "three"), (*missing, "three")]
    torch.set_num_threads(threads)
    results = runs.Results(file)
    assert len(tables.reported(results, "adamw")) == 2
    adamw = {row["day"]: row["seconds"] for row in results.find("clock", "adamw")}
    usual = [row["seconds"] for row in results.find("report", "adamw")]
    (row,) = results.find("report", "lngd", seed=2)
    expected = row["seconds"] * sum(usual) / len(usual) / adamw["three"]
    assert tables.reported(results, "lngd")[1]["seconds"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "adam"], "--rivals: got 'adam'"),
        (["--phases", "tune", "--data", "no-such-folder"], "--data: no-such-folder has no train.json.gz"),
        (["--phases", "tune"], "--data: got none"),
        (["--trial", "lr=1"], "--data: got none"),
        (["--trial", "rival=adam"], "--trial: rival: got 'adam', accepted: lngd"),
        (["--trial", "lr=1"], "--trial: rival: got 'lngd', accepted: adamw"),
        (["--trial", "lr=fast"], "--trial: lr: got 'fast', accepted: a number"),
        (["--trial", "lr"], "--trial: lr: got '', accepted: a number"),
        (["--trial", "lr=-1"], "--trial: lr: got -1.0, accepted: a rate above 0"),
        (["--trial", "fresh=1"], "--trial: fresh: got 1.0, accepted: a number between 0 and 1"),
        (["--trial", "dampign_rho=1"], "dampign_rho"),
        (["--trial", "rival=adamw,damping=0.5"], "--trial: got damping for adamw, accepted: weight_decay"),
        (["--phases", "plot"], "no reported runs"),
        (["--forget", "lgnd", "--phases", "table"], "--forget: got 'lgnd', accepted: lngd"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    rivals = {"adamw": "lr = 1e-3"} if "adamw" in message else {"lngd": "lr = 1e-3"}
    path = study(tmp_path / "s.toml", rivals=rivals)
    with pytest.raises(ValueError, match=message):
        compare_optimizers.main([str(path), *arguments, "--results", str(tmp_path / "none.json")])


def test_missing_data_and_models_are_named() -> None:
    with pytest.raises(ValueError, match="--data: no-such-folder has no train"):
        load_task("cifar10-resnet", Path("no-such-folder"))
    with pytest.raises(ValueError, match="--model: got none"):
        load_task("cifar10-efficientnet", Path("x"))
