"""Pages for people: links lead somewhere, options exist, figures are those that were measured, versions agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

import hf_lngd
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.integrations.training_args import take_lr

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FIELDS = set(LNGDConfig().to_dict())
# Options of other packages that the table of migration names.
FOREIGN = {"damping=0.001", "compute_method=EIGEN", 'adjust_lr_fn="match_rms_adamw"', 'adjust_lr_fn="original"'}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|tests|hf_lngd|scripts|benchmarks|examples)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


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


def test_figures_of_tuning_are_those_of_the_results() -> None:
    """Every figure with a fraction stands in the README or in benchmarks/README.md."""
    known = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "benchmarks/README.md").read_text(
        encoding="utf-8"
    )
    known_numbers = set(re.findall(r"\d+\.\d+", known))
    figures = set(re.findall(r"[+−]?\d+\.\d+", (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")))
    signed = {figure for figure in figures if figure[0] in "+−"}
    assert len(signed) >= 8 and all(figure in known for figure in signed)
    assert {figure.lstrip("+−") for figure in figures} - known_numbers <= {"0.002"}  # a bound over several


@pytest.mark.parametrize(("m", "d"), [(48, 24), (24, 48)])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_the_setting_that_is_muon(m: int, d: int, adjust: str) -> None:
    """docs/migrating.md: the rate, the momentum and the direction of torch.optim.Muon, to the quintics."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(d, m, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    rate = 0.02 / (d**0.5 if adjust == "original" else 5.0)
    fields = {"damping_rho": 1000.0, "row_decay": 0.0, "embedding": "fallback", "momentum": 0.95, "weight_decay": 0.1}
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
    assert latest is not None and latest[1] == project["version"] == hf_lngd.__version__


def test_pages_are_short() -> None:
    for page, most in (("extending", 70), ("migrating", 80), ("tuning", 60)):
        assert len((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").splitlines()) <= most
