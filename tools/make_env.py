"""Makes the project's environment: `python3 tools/make_env.py .venv`. The Makefile calls it; it needs Python alone.
With ``oldest`` after the extras it has the lower bounds of pyproject.toml in place of the newest versions.

torch comes from the first of:

1. the environment itself, when it is made again;
2. the interpreter that runs this script (an active virtual environment, conda, the system), when it can import a torch
   that satisfies pyproject.toml: its folder goes on the new environment's path, nothing in it is changed;
3. pip: the newest torch where an NVIDIA driver answers, else the CPU build where pip's configuration offers one.

The syntax stays that of Python 3.7, so that an old interpreter gives the message below and no syntax error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MIN_PYTHON = (3, 11)
CPU_TORCH = "2.13.0"
LINK = "hf_lngd_torch.pth"
_FIND_TORCH = "import os, torch; print(torch.__version__); print(os.path.dirname(os.path.dirname(torch.__file__)))"


def fail(message: str) -> None:
    """Ends the program with one line that says what to do."""
    sys.exit("error: " + message)


def run(*command: str, quiet: bool = False) -> bool:
    """Runs a command; True when it succeeded. `quiet` hides what it prints."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.call(list(command), stdout=sink, stderr=sink) == 0


def check_python() -> None:
    """Goes on under a newer interpreter of this machine when the one at hand is too old."""
    if sys.version_info >= MIN_PYTHON:
        return
    at_hand = f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}"
    for minor in (13, 12, 11, 14):
        newer = shutil.which(f"python3.{minor}")
        if newer:
            print(f"{at_hand}: going on with {newer}", flush=True)
            sys.exit(subprocess.call([newer, *sys.argv]))
    needed = ".".join(str(part) for part in MIN_PYTHON)
    fail(f"python: hf_lngd needs Python {needed} or newer, {at_hand}; name one: make demo PYTHON=/path/to/python3")


def requirements(oldest: bool = False) -> dict[str, str]:
    """The version ranges in pyproject.toml, such as `>=2.9.1,<3`, by name; or the oldest of each, such as `==2.9.1`."""
    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
        found = dict(re.findall(r'"([\w-]+)(>=[^"]*,<[^"]*)"', file.read()))
    return {name: "==" + text[2:].split(",")[0] for name, text in found.items()} if oldest else found


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version such as `2.13.0+cpu` lies in a range of `==`, `>=` and `<` bounds."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]

    for bound in requirement.split(","):
        if bound.startswith("==") and numbers(version) != numbers(bound):
            return False
        if bound.startswith(">=") and numbers(version) < numbers(bound):
            return False
        if bound.startswith("<") and numbers(version) >= numbers(bound):
            return False
    return True


def find_torch(python: str, requirement: str) -> tuple[str, str] | None:
    """(version, folder of packages) of the torch that an interpreter imports, if it lies in the range."""
    # Run beside the interpreter: a folder named torch where make was called is not the package.
    answer = subprocess.run(
        [python, "-c", _FIND_TORCH], capture_output=True, text=True, cwd=os.path.dirname(python), check=False
    )
    lines = answer.stdout.splitlines()
    if answer.returncode or len(lines) < 2:
        return None
    version, folder = lines[-2:]
    if not satisfies(version, requirement):
        print(f"torch {version} in {folder} is left alone: torch{requirement} is wanted", flush=True)
        return None
    return version, folder


def has_cuda() -> bool:
    """Whether an NVIDIA driver answers here."""
    return bool(shutil.which("nvidia-smi")) and run("nvidia-smi", "-L", quiet=True)


def provide_torch(python: str, site: str, requirement: str) -> None:
    """Sees to it that the environment's interpreter imports a fitting torch."""
    if find_torch(python, requirement):
        return
    outer = find_torch(sys.executable, requirement)
    if outer:
        print(f"keeping torch {outer[0]} in {outer[1]}", flush=True)
        link = os.path.join(site, LINK)
        with open(link, "w", encoding="utf-8") as file:
            file.write(outer[1] + "\n")
        if find_torch(python, requirement):
            return
        os.remove(link)
    pip = [python, "-m", "pip", "install"]
    if has_cuda():
        installed = run(*pip, "torch" + requirement)
    else:
        exact = requirement if requirement.startswith("==") else f"=={CPU_TORCH}"
        # `+cpu` is asked for first: of several builds of one version pip takes the last by name, which is CUDA's.
        print(f"installing torch{exact}, its CPU build where one is offered", flush=True)
        installed = run(*pip, f"torch{exact}+cpu", quiet=True) or run(*pip, f"torch{exact}")
    if not installed:
        fail("torch: pip could not install it, its last lines say why; install it by hand, then run make again")


def main() -> None:
    """Makes or completes the environment at the path given, and installs the project with its extras into it."""
    if len(sys.argv) < 2:
        fail("path: say where the environment goes, as in `make_env.py .venv`")
    check_python()
    target = os.path.abspath(sys.argv[1])
    extras = sys.argv[2] if len(sys.argv) > 2 else "demo,test"
    wanted = requirements(oldest=sys.argv[3:] == ["oldest"])
    python = os.path.join(target, "bin", "python")
    usable = os.path.exists(python) and run(python, "-m", "pip", "--version", quiet=True)
    if not usable and not run(sys.executable, "-m", "venv", "--clear", target):
        fail("venv: this Python cannot make environments; Debian and Ubuntu have the package python3-venv for it")
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    provide_torch(python, where.stdout.strip(), wanted["torch"])
    constraints = os.path.join(target, "constraints.txt")
    with open(constraints, "w", encoding="utf-8") as file:
        file.writelines(f"{name}{version}\n" for name, version in wanted.items())
    if not run(python, "-m", "pip", "install", "-c", constraints, "-e", f"{ROOT}[{extras}]"):
        fail(f"install: pip could not install hf_lngd with its extras {extras}, its last lines say why")


if __name__ == "__main__":
    main()
