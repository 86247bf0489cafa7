"""Pages for people: links lead somewhere, snippets run, options exist, figures are those that were measured, versions
agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import hf_lngd
from benchmarks.report import paper_tables, pictures, result_tables
from benchmarks.report.clocks import clock_of, references
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.integrations.training_args import take_lr
from tests.hf_helpers import hf_encoded, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs
from tools import options_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / name / "README.md" for name in ("benchmarks", "model_cards")),
    ]
)
FIELDS = set(LNGDConfig().to_dict())
# Options of other packages that the table of migration names.
FOREIGN = {"damping=0.001", "compute_method=EIGEN", 'adjust_lr_fn="match_rms_adamw"', 'adjust_lr_fn="original"'}


def anchors_of(page: Path) -> set[str]:
    """What a page's headings are called in links, on the site as in a repository's browser."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert target.startswith("https://") or path.exists(), link
        assert not anchor or anchor in anchors_of(path), link
    for path in re.findall(r"`((?:docs|tests|hf_lngd|scripts|benchmarks|examples|tools)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or "TASK" in path, path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lists_are_lists_on_the_site_too(page: Path) -> None:
    """Python-Markdown takes a list for text where no empty line stands before it."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if re.match(r"(-|\d+\.) ", line):
            assert not before or re.match(r"(-|\d+\.|  ) ?", before), line


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120 and not line.startswith("| ")]


def test_every_page_is_in_the_navigation() -> None:
    shown = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert shown == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_options_page_is_what_the_command_makes() -> None:
    text = options_page.PAGE.read_text(encoding="utf-8")
    assert text == options_page.render(), "python -m tools.options_page"
    assert all(f"| `{name}` |" in text for name in FIELDS - {"preset", "family"})


def test_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with a tiny model in the folder that has the name of the Hub's."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer, pairs = hf_tokenizer(), hf_pairs(16)
    model = hf_seq2seq_model("marian", tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained("Helsinki-NLP/opus-mt-en-de")
    hf_write_pairs(tmp_path / "train.json", pairs)
    found: dict[str, Any] = {}
    exec(blocks[0], found)
    assert found["trainer"].state.global_step == 2 and isinstance(found["trainer"].optimizer.optimizer, LNGD)
    rows = tokenizer.pad(hf_encoded(tokenizer, pairs[:1]), return_tensors="pt")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    given = {"model": model, "loader": [rows, rows]}
    exec(blocks[1], given)
    assert given["scheduler"].last_epoch == 2
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["migrating.md", "tuning.md"])
def test_options_exist_and_are_accepted(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    settings = {code for code in re.findall(r"`([^`\n]+)`", text) if re.match(r"\w+=\S+$", code)} - FOREIGN
    assert settings
    for setting in settings - {"exclude=REGEX"}:
        LNGDConfig.from_optim_args(take_lr(setting)[1])
    table = re.findall(r"^\|[^|]+\|([^|]+)\|$", text, re.MULTILINE)  # the column "here"
    here = {code for cell in table for code in re.findall(r"`(\w+)`", cell)}
    assert here <= FIELDS | {"lr"}


# What tuning.md says, and the one row or paragraph that it quotes: a part of that, and the figures as they stand there.
HERE, LOG, OPTIONS = "docs/results.md", "docs/experiments.md", "docs/options.md"
QUOTES = [
    ("chance alone is worth 0.01 and 0.02", HERE, "Differences of the validation loss on Multi30k", "0.01"),
    ("chance alone is worth 0.01 and 0.02", HERE, "On the CIFAR-10 ResNet (", "0.02"),
    ("best rate of matrices was 0.8 to 4.3 times", HERE, "Where the matrices' rate was tuned apart", "0.8 4.3"),
    ("`momentum`: 0.8 is the default;", OPTIONS, "| `momentum` |", "0.8"),
    ("0.9 costs +0.124", HERE, "| `momentum` |", "0.9: +0.124"),
    ("decay by 1.5 lr a step", OPTIONS, "| `weight_decay` |", "1.5 for LNGD's layers"),
    ("AdamW gains 0.26 with 1.6 and LNGD 0.16 with 0.4", LOG, "Weight decay was at 0.1",
     "AdamW gains 0.26 with 1.6 LNGD 0.16 with 0.4"),
    ("1000 costs +0.035 on Multi30k", HERE, "| `damping_rho` |", "1000: +0.035"),
    ("on the ResNet 10 gains −0.030", HERE, "| ρ = 10; ρ = 1000 |", "−0.030"),
    ("at 100 in place of 20, −0.001 on Multi30k", HERE, "| `factor_interval`,", "100: −0.001"),
    ("and +0.032 on the ResNet", HERE, "| intervals of 100 |", "+0.032"),
    ("gained −0.037 there beside", HERE, "| `embedding` |", "beside exact −0.037"),
    ("`momentum_on=update` costs +0.106", HERE, "| `momentum_on` |", "update, +0.106"),
    ("`direction=natural` +0.194", HERE, "| `direction` |", "natural, +0.194"),
    ("state was 0.86 of AdamW's with `fast`", "docs/cost.md", "AdamW's state for `fast`", "0.86 `fast`"),
    ("LNGD ends 0.14 below AdamW on Multi30k", HERE, "LNGD ends lowest, 0.14", "0.14 below AdamW"),
    ("and 0.041 on WMT news", HERE, "The order is the same and", "0.041 below AdamW"),
    ("after 0.97 and 0.95 of its seconds", HERE, "LNGD ends lowest, 0.14", "0.97 of AdamW's seconds"),
    ("after 0.97 and 0.95 of its seconds", HERE, "The order is the same and", "0.95 of its seconds"),
    ("steps took 1.18 times as long", HERE, "Here LNGD has no lead", "1.18 times as long"),
    ("Muon ended 0.6 points above", HERE, "LNGD ends 12.0 points above AdamW", "Muon ends 0.6 points above"),
    ("it is 0.38 behind on Multi30k", HERE, "LNGD ends lowest: 0.036", "0.38 above"),
]  # fmt: skip
# Fields that change Multi30k's loss by little: what of a row tells by how much.
LITTLE = {"fisher": "sampled: −", "bias": "factor: +"}


def units_of(page: str) -> list[str]:
    """Paragraphs, and of tables rows."""
    parts = re.split(r"\n\n|\n(?=\|)", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(part.split()) for part in parts]


def test_figures_of_tuning_are_those_of_the_rows_that_they_quote() -> None:
    text = " ".join((ROOT / "docs/tuning.md").read_text(encoding="utf-8").split())
    covered = set()
    for said, page, row, figures in QUOTES:
        start = text.index(said)
        covered |= set(range(start, start + len(said)))
        (unit,) = (unit for unit in units_of(page) if row in unit)
        place = 0
        for figure in figures.split():  # in this order
            found = re.compile(rf"(?<![\d.]){re.escape(figure)}(?!\d)").search(unit, place)
            assert found, (said, figure, unit)
            place = found.end()
    (bound,) = re.findall(r"change Multi30k's loss by at most (0\.\d+)", text)
    for field, before in LITTLE.items():
        (unit,) = (unit for unit in units_of(HERE) if unit.startswith(f"| `{field}`"))
        assert float(re.findall(rf"{re.escape(before)}(0\.\d+)", unit)[0]) <= float(bound), field
    rest = [found[0] for found in re.finditer(r"[+−]?\d+\.\d+", text) if found.start() not in covered]
    assert rest == [bound]


def test_tables_are_made_from_the_files_of_results() -> None:
    """Rows that arrive, and pages that were not made again, are noticed."""
    folder = ROOT / "benchmarks" / "results"
    marked = 0
    for page in result_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- table: ") == len(result_tables.MARKED.findall(text)) > 0, page.name
        assert result_tables.render(text) == text, "python -m benchmarks.report.result_tables"
        marked += text.count("<!-- table: ")
    assert marked == 12
    assert paper_tables.page(folder) == (folder / "paper.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="table: got 'nothing', accepted: multi30k"):
        result_tables.render("<!-- table: nothing -->\n<!-- end of table -->")


@pytest.mark.parametrize("name", result_tables.STUDIES)
def test_reported_runs_are_those_of_the_tuned_settings(name: str) -> None:
    """Each seed and length once, no seed that was tuned on; every rival of the study that was reported."""
    spec, results = result_tables.results_of(name)
    for rival in spec.rivals:
        rows = results.find("report", rival)
        runs = [(row["seed"], row["steps"]) for row in rows]
        assert len(set(runs)) == len(runs) and not {seed for seed, _ in runs} & set(spec.tuning_seeds), rival
        best = results.best(rival).to_dict() if rows else None
        assert all(row["settings"] == best for row in rows), rival
        # seconds compare through AdamW's, run on the same clock
        assert {clock_of(row) for row in rows} <= {clock_of(row) for row in references(results)}, rival
    if results.find("report", "lngd-same"):  # which takes the rate that AdamW's own search found
        assert results.best("lngd-same").lr == results.best("adamw-one").lr


@pytest.mark.parametrize("name", result_tables.STUDIES)
def test_pictures_are_of_the_rows_that_there_are(name: str) -> None:
    study, results = result_tables.results_of(name)
    for end, rivals in pictures.pictures_of(list(study.rivals)).items():
        with Image.open(results.path.with_name(f"{name}{end}.png")) as picture:
            said = picture.text["Description"]
        texts = pictures.legend(results, rivals, study.label)
        assert said == pictures.described(results, texts), "--phases plot"


@pytest.mark.parametrize(("m", "d"), [(48, 24), (24, 48)])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_the_setting_that_is_muon(m: int, d: int, adjust: str) -> None:
    """docs/migrating.md: torch.optim.Muon's rate, momentum and direction, to the quintics and the row scale."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(d, m, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    rate = 0.02 / (d**0.5 if adjust == "original" else 5.0)
    fields = {"whiten": "none", "embedding": "fallback", "momentum": 0.95, "weight_decay": 0.1, "update_interval": 1}
    optimizers = (
        LNGD(ours, lr=rate, **fields),
        torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust),
    )
    for _ in range(3):
        x, y = torch.randn(64, d), torch.randn(64, m)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    mine, muons = ours.weight.detach() - before, theirs.weight.detach() - before
    cosine = torch.nn.functional.cosine_similarity(mine.flatten(), muons.flatten(), dim=0)
    assert cosine > 0.98 and 0.8 < mine.norm() / muons.norm() < 1.25


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    latest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert latest is not None and latest[1] == project["version"] == hf_lngd.__version__ == cited
