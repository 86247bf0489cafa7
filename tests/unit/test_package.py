"""What is shipped: the wheel works outside the checkout, dependencies are bounded, no file names a machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_lngd"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the built wheel is unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves build folders behind, which would end up in later wheels.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=source, capture_output=True, timeout=300)
    (wheel,) = folder.glob("hf_lngd-*-py3-none-any.whl")
    target = folder / "site"
    with ZipFile(wheel) as files:  # which is all that an installer does with a wheel of Python files
        files.extractall(target)
    return target


def test_what_an_import_loads_and_no_warning_that_the_user_did_not_cause() -> None:
    """None at all of the core; none of torch.jit, which torch deprecates, of what the Trainer's part imports."""
    heavy = ("transformers", "accelerate", "datasets", "evaluate", "hf_lngd.paper", "hf_lngd.integrations")
    code = f"""
import sys
import warnings
import torch
warnings.simplefilter("error")
from hf_lngd import LNGD
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
for fields in ({{}}, {{"direction": "natural"}}):
    optimizer = LNGD(model, **fields)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.close()
    print([name for name in {heavy!r} if name in sys.modules])
warnings.simplefilter("default")
warnings.filterwarnings("error", message=".*torch.jit")
import hf_lngd.integrations.trainer
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['hf_lngd.paper']"]


def test_wheel_has_licence_types_and_metrics(installed: Path) -> None:
    (info,) = installed.glob("hf_lngd-*.dist-info")
    assert "Apache License" in next(info.rglob("LICENSE")).read_text(encoding="utf-8")
    assert (installed / "hf_lngd" / "py.typed").is_file()
    assert (installed / "hf_lngd" / "integrations" / "model_card.md.jinja").is_file()
    shipped = {path.relative_to(installed) for path in (installed / "hf_lngd").rglob("*.py")}
    assert shipped == {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert not (installed / "tests").exists() and not (installed / "scripts").exists()


def test_the_wheel_says_its_version_and_loads_its_metrics_offline(installed: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "import hf_lngd\n"
        f"assert hf_lngd.__file__.startswith({str(installed)!r}), hf_lngd.__file__\n"
        "from hf_lngd.metrics import load_metric\n"
        "metric = load_metric('sacrebleu')\n"
        "result = metric.compute(predictions=['Das ist gut so .'], references=[['Das ist gut so .']])\n"
        "print(round(result['score'], 3))\n"
        "sys.argv[1:] = ['--version']\n"
        "runpy.run_module('hf_lngd', run_name='__main__')\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    score, version = done.stdout.splitlines()[-2:]
    assert score == "100.0"
    assert f"{version.replace(' ', '-').strip()}.dist-info" in {path.name for path in installed.iterdir()}


def shipped_files() -> list[Path]:
    """The text files of the repository: what git tracks or would track, else all but hidden and built ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix not in {".gz", ".png", ".pyc", ".safetensors"}]


def test_no_file_names_a_machine() -> None:
    folders = "|".join(("work", "farm", "root", "home", "tmp", "Users", "opt"))
    pattern = re.compile(rf"(?<![\w.~}})/-])/(?:{folders})/\w")
    found = []
    for path in shipped_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
