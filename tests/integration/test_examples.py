"""Every file in examples/ runs, and what it trains learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "examples"
# file → the package that it needs, if it is none of ours
NEEDED = {"accelerate_loop": None, "text_classification": None, "lora": "peft", "lightning_module": "pytorch_lightning"}
NEEDED |= {"timm_loop": "timm"}


def names_of(text: str) -> dict[str, Any]:
    """What a piece of code defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, "example", "exec"), names)
    return names


def example(name: str) -> dict[str, Any]:
    package = NEEDED[name]
    if package is not None:
        pytest.importorskip(
            package, exc_type=(ImportError, RuntimeError), reason=f"{package} is not installed, or broken"
        )
    return names_of((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def assert_learned(losses: list[float]) -> None:
    assert len(losses) >= 6 and losses[-1] < 0.7 * losses[0], losses


def test_none_is_left_out_and_each_is_short() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NEEDED)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_module"])
def test_loops(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_learned(example(name)["main"]())


@pytest.mark.parametrize("name", ["text_classification", "lora"])
def test_trainers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_learned(example(name)["main"](str(tmp_path)))
    assert "A step takes about" in capsys.readouterr().out


def test_timm() -> None:
    names = example("timm_loop")
    torch.manual_seed(0)
    assert_learned(names["train"](names["make_model"]()))


def test_the_loop_that_timm_has_with_another_model() -> None:
    """timm needs a torchvision that fits torch: the loop is tested without, too."""
    names = names_of((FOLDER / "timm_loop.py").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    assert_learned(names["train"](model))


def test_the_quickstart_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, as a kernel would run them; nothing is left in it."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((FOLDER / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    names = names_of("\n".join("".join(cell["source"]) for cell in code))
    for losses in names["losses"].values():
        assert_learned(losses)
    assert names["loss"].isfinite()
