"""Do the main job in an empty environment without extras: with the built wheel, and again after `pip install .`.

python -m tests.packaging.wheel_check [--constraint FILE] [--pip-args ...]: minutes, most of them for torch. `make
wheel-check` runs it under constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from pplr.testing import tiny_decoder, tiny_tokenizer
from tests.conftest import write_atomic_files
from tests.packaging.main_job import ROOT, main_job

LIMIT_S = 1800
ABSENT = ("cryptography", "flwr", "grpc", "matplotlib", "nicegui", "ray")


def call(words: list[str | Path], folder: Path, code: int = 0, says: str = "") -> None:
    """Run a command; end with what it printed when it ends another way than it should."""
    own = {"PPLR_CACHE": str(folder / "cache"), "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode != code or says not in done.stdout + done.stderr:
        expected = f"expected exit status {code} and {says!r}, got {done.returncode} and"
        sys.exit(f"error: {shlex.join(command)}\n{expected}\n{done.stdout}{done.stderr}")
    print(f"ok  {Path(command[0]).name} {shlex.join(command[1:])[:100]}", flush=True)


def check(folder: Path, constraint: Path, pip_args: list[str]) -> None:
    """Do all of it in a folder."""
    call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *pip_args, "--wheel-dir", "dist", ROOT], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "empty", with_pip=True)
    inside = folder / "empty" / "bin"
    pip = [inside / "python", "-m", "pip"]
    install = [*pip, "install", "--quiet", *pip_args, "--constraint", constraint]
    tiny_decoder(layers=3, width=16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_atomic_files(folder / "data" / "tiny")
    call([*install, wheel], folder)
    do_main_job(folder, folder / "wheel alone")
    call([*pip, "uninstall", "--quiet", "--yes", "pplr"], folder)
    call([*install, "."], ROOT)
    do_main_job(folder, folder / "from the source")


def do_main_job(folder: Path, within: Path) -> None:
    """Do it with what is installed in the empty environment, in a folder of its own."""
    within.mkdir()
    inside = folder / "empty" / "bin"
    call([inside / "python", "-m", "pip", "check"], within)
    there = f"from importlib.util import find_spec; print([name for name in {ABSENT} if find_spec(name)])"
    call([inside / "python", "-c", there], within, says="[]")
    call([inside / "python", "-c", "import pplr; print(pplr.__file__)"], within, says=str(folder / "empty"))
    for step in main_job(folder / "data" / "tiny", folder / "model"):
        call([inside / "pplr", *step.arguments], within, step.code, step.says)


def main() -> None:
    """Read the arguments, and do it in a folder that is gone in the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--pip-args", default="", help="More arguments of pip, in one word.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder).resolve(), chosen.constraint.resolve(), shlex.split(chosen.pip_args))
    print("the main job is done in an empty environment, with the wheel and after `pip install .`")


if __name__ == "__main__":
    main()
