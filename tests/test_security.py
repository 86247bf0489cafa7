"""Nothing that is loaded runs: no pickle but `weights_only`, no code of a model or data set unless the user says so."""

from __future__ import annotations

import ast
import pickle
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_lngd import LNGD, load_checkpoint, save_checkpoint
from scripts import run_image_classification, run_translation
from tests.helpers import Bomb

ROOT = Path(__file__).parent.parent
FILES = [
    path for folder in ("hf_lngd", "scripts", "benchmarks", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
]
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
             "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "yaml.load"}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def value(call: ast.Call, name: str) -> str:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_run_that_was_read(path: Path) -> None:
    for name, call in calls(path):
        where = f"{path}:{call.lineno}: {name}"
        assert name not in FORBIDDEN, where
        if name == "torch.load":
            assert value(call, "weights_only") == "True", where
        assert value(call, "trust_remote_code") in ("", "False", "args.trust_remote_code", "trust_remote_code"), where
        assert value(call, "allow_pickle") in ("", "False"), where
        assert value(call, "shell") in ("", "False"), where


def test_remote_code_is_off_unless_asked_for() -> None:
    for kind in (run_image_classification.ModelArguments, run_translation.ModelArguments):
        assert kind.__dataclass_fields__["trust_remote_code"].default is False


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    for line in ("eval(x)", "torch.load(f)", "torch.load(f, weights_only=False)", "f(trust_remote_code=True)"):
        (tmp_path / "bad.py").write_text(line)
        with pytest.raises(AssertionError):
            test_nothing_is_run_that_was_read(tmp_path / "bad.py")


def test_a_checkpoint_holds_nothing_that_runs(tmp_path: Path) -> None:
    """A pickle in the place of its file, or in it, does not run."""
    folder, model = tmp_path / "checkpoint", nn.Linear(4, 3)
    optimizer = LNGD(model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(folder, model, optimizer)
    (file,) = folder.iterdir()
    whole, bomb = file.read_bytes(), Bomb(tmp_path / "ran")
    for spoil in (lambda: file.write_bytes(pickle.dumps(bomb)), lambda: torch.save({"model": bomb}, file)):
        spoil()
        with pytest.raises(ValueError, match=f"checkpoint {file}: cannot be read"):
            load_checkpoint(folder, model, optimizer)
    file.write_bytes(whole)
    assert not (tmp_path / "ran").exists()
    load_checkpoint(folder, model, optimizer)
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "ran").exists()  # it would have


def test_every_dependency_is_bounded_on_both_sides() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for dependency in named:
        if not dependency.startswith("hf_lngd["):
            assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+,<[0-9.]+", dependency), dependency
