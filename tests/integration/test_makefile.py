"""The commands of the Makefile: what make would run, and how the environment is chosen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import make_env

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do, without doing it."""
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_targets(tmp_path: Path) -> None:
    """The environment comes first; the audit looks at it and not at its own."""
    environment = tmp_path / "env"
    for target, needed in (
        ("demo", ("tools/make_env.py", "scripts/demo.py")),
        ("demo-vision", ("scripts/demo_vision.py",)),
        ("test", ("-m pytest", "--ignore=tests/studies", "--ignore=tests/compat", '-m "not slow"')),
        ("test-studies", ("-m pytest", "tests/studies")),
        ("test-oldest", (f"python3.12 tools/make_env.py {environment}/oldest test oldest", "-m pytest")),
        (
            "test-transformers",
            ("for version in 5.6 ", "transformers==$version.*", "-m pytest", "tests/integration/test_stock.py"),
        ),
        ("test-all", ("-m pytest", "--ignore=tests/compat")),
        ("test-compat", ("tools/make_env.py", f"{environment}/compat compat,test", "-m pytest", "tests/compat")),
        (
            "docs",
            (
                f"{environment}/docs/bin/python -m pip install",
                f"{environment}/docs/bin/python -m mkdocs build --strict",
            ),
        ),
        ("lint", ("-m ruff check", "-m mypy")),
        ("audit", (f"PIPAPI_PYTHON_LOCATION={environment}/bin/python {environment}/audit/bin/python -m pip_audit",)),
    ):
        done = dry_run(target, f"VENV={environment}")
        assert done.returncode == 0, done.stderr
        places = [done.stdout.index(part) for part in needed]
        assert places == sorted(places), target
    assert "not slow" not in dry_run("test-all").stdout


def test_the_demo_takes_as_long_as_the_pages_say() -> None:
    """Measured: both trainings of the committed run, and a minute for what is around them."""
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"make demo .*\(10 minutes\)", told)
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    assert "`make demo` needs about ten minutes after installation" in page
    assert "`make demo` (10 minutes on two cores)" in (ROOT / "README.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    seconds = sum(run["train_runtime"] for run in runs.values() if isinstance(run, dict) and "train_runtime" in run)
    assert 8 * 60 < seconds < 11 * 60


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    command = ["make", "env", f"VENV={tmp_path / 'env'}", "PYTHON=no-such-python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "error: python: no 'no-such-python' found" in done.stderr


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_env, "MIN_PYTHON", (99, 1))
    monkeypatch.setattr(make_env.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: python: hf_lngd needs Python 99\.1 or newer, .* is Python 3\.\d+"):
        make_env.check_python()


@pytest.mark.parametrize(
    ("version", "requirement", "answer"),
    [
        ("2.13.0", ">=2.13,<3", True),
        ("2.13.1+cpu", ">=2.13,<3", True),
        ("2.14.0a0+git1", ">=2.13,<3", True),
        ("2.12.9", ">=2.13,<3", False),
        ("2.9.0", ">=2.13,<3", False),
        ("3.0.0", ">=2.13,<3", False),
        ("2.9.1+cu128", "==2.9.1", True),
        ("2.9.2", "==2.9.1", False),
    ],
)
def test_which_torch_is_kept(version: str, requirement: str, answer: bool) -> None:
    assert make_env.satisfies(version, requirement) is answer


def test_an_importable_torch_is_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def find(python: str, requirement: str) -> tuple[str, str] | None:
        linked = (tmp_path / make_env.LINK).exists()
        return ("2.13.0", "elsewhere") if python == sys.executable or linked else None

    monkeypatch.setattr(make_env, "find_torch", find)
    monkeypatch.setattr(make_env, "run", lambda *command, **options: asked.append(command) or True)
    make_env.provide_torch("inner-python", str(tmp_path), ">=2.9.1,<3")
    assert (tmp_path / make_env.LINK).read_text(encoding="utf-8") == "elsewhere\n"
    assert not asked


@pytest.mark.parametrize(
    ("cuda", "requirement", "wanted"),
    [
        (True, ">=2.9.1,<3", "torch>=2.9.1,<3"),
        (True, "==2.9.1", "torch==2.9.1"),
        (False, ">=2.9.1,<3", f"torch=={make_env.CPU_TORCH}+cpu"),
        (False, "==2.9.1", "torch==2.9.1+cpu"),
    ],
)
def test_which_torch_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, requirement: str, wanted: str
) -> None:
    asked = []
    monkeypatch.setattr(make_env, "find_torch", lambda *_: None)
    monkeypatch.setattr(make_env, "has_cuda", lambda: cuda)
    monkeypatch.setattr(make_env, "run", lambda *command, **options: asked.append(command[-1]) or True)
    make_env.provide_torch("inner-python", str(tmp_path), requirement)
    assert asked == [wanted]


def test_bounds_are_those_of_the_project() -> None:
    """Of every dependency and extra, once: `make test-oldest` installs the lower ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [text for extra in project["optional-dependencies"].values() for text in extra if "[" not in text]
    ranges = {name + bounds for name, bounds in make_env.requirements().items()}
    assert ranges == {*project["dependencies"], *asked}
    oldest = make_env.requirements(oldest=True)
    assert len(oldest) == len(ranges) and oldest["torch"] == "==2.9.1" and oldest["transformers"] == "==5.6"
