"""From ``git clone`` to the first recommendation, as the README says it, in minutes: a new clone, a new environment.

python -m benchmarks.first_contact: with nothing in pip's cache or pplr's, and nothing else running, which it checks. It
clones what is committed here, and writes ``benchmarks/results/first_contact.json`` and the README's sentence. pip works
as it is set up on this machine; where that has it look on disk or in an index besides PyPI's, the sentence says so.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, write_result
from pplr.storage import write_atomic

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OPENS, CLOSES = "<!-- written by python -m benchmarks.first_contact -->", "<!-- until here -->"
SHOWN = ("torch", "transformers")
TRAINED = "run folder:"
"""What `make demo` says between its two commands."""
RUN_DIR = "runs/demo"
"""Where `make demo` keeps its run."""
METRIC = "ndcg@10"
PYPI = "https://pypi.org/simple"
SHORT = {"-f": "find-links", "-i": "index-url"}
LOOKING = {"find-links": "a page of packages", "index-url": "another index", "extra-index-url": "another index"}
"""What pip's settings of where to look name, when it is not on disk."""
BUSY = 0.25
"""Processes per core, waiting or running, from which on a machine is not idle."""


def stream(words: list[str], within: Path, environment: Mapping[str, str], told: Callable[[str], None]) -> None:
    """Run a command, show what it says, and hand on each line when it comes."""
    print("$", shlex.join(words), flush=True)
    with subprocess.Popen(
        words, cwd=within, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            told(line)
    if process.returncode != 0:
        sys.exit(f"error: {shlex.join(words)} ended with {process.returncode}")


def surroundings(folder: Path) -> dict[str, str]:
    """Make the environment that everything runs in: this one, with caches that are empty or off."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PIP_NO_CACHE_DIR": "1", "PPLR_CACHE": str(folder / "cache")}


def measure(source: Path, folder: Path, pip_args: str = "") -> dict[str, float]:
    """Clone, install, train and recommend in a new folder; return the minutes of each step."""
    environment = surroundings(folder)
    make = ["make", f"PIP_ARGS={pip_args}"] if pip_args else ["make"]
    trained: list[float] = []

    def watch(line: str) -> None:
        if line.startswith(TRAINED):
            trained.append(time.monotonic())

    clone, ends = folder / "pplr", [time.monotonic()]
    stream(["git", "clone", "--quiet", str(source), str(clone)], folder, environment, watch)
    ends.append(time.monotonic())
    stream([*make, ".venv/.installed"], clone, environment, watch)
    ends.append(time.monotonic())
    stream([*make, "demo"], clone, environment, watch)
    ends += [trained[-1] if trained else time.monotonic(), time.monotonic()]
    steps = ("clone", "install", "fetch and train", "recommend")
    spans = {step: (end - start) / 60 for step, (start, end) in zip(steps, pairwise(ends), strict=True)}
    return {**spans, "total": sum(spans.values())}


def installed(clone: Path) -> dict[str, str]:
    """Read which versions the new environment has."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    done = subprocess.run([clone / ".venv" / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def pip_settings(python: Path, environment: Mapping[str, str]) -> str:
    """Ask pip how it is set up, by files and by the environment."""
    words = [str(python), "-m", "pip", "config", "list"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return str(done.stdout)


def other_sources(settings: str, pip_args: str = "") -> list[str]:
    """Tell in plain words where pip looks besides PyPI, with no path and no host.

    Args:
        settings: What ``pip config list`` printed, ``section.name='values'`` in each line.
        pip_args: As PIP_ARGS of make, which come on top.
    """
    places: list[tuple[str, str]] = []
    for line in settings.splitlines():
        key, _, value = line.partition("=")
        places += [(key.rpartition(".")[2], place) for place in str(ast.literal_eval(value)).split()]
    words = [part for word in shlex.split(pip_args) for part in (word.split("=", 1) if word[0] == "-" else [word])]
    places += [(SHORT.get(word, word.lstrip("-")), place) for word, place in pairwise(words)]
    found = set()
    for name, place in places:
        if name in LOOKING and place.rstrip("/") != PYPI:
            on_disk = place.startswith("file:") or "://" not in place
            found.add("packages on disk" if on_disk else LOOKING[name])
    return sorted(found)


def demo_result(run: Path) -> dict[str, Any]:
    """Read what the demo's recommendations were worth, beside popularity, over the same users."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "run": {METRIC: metrics["overall"][METRIC]},
        "popularity": {METRIC: metrics["floors"]["popularity"][METRIC]},
        "users": sum(own["users"] for own in metrics["clients"].values()),
    }


def sentence(content: Mapping[str, Any]) -> str:
    """Say how long it took, where, with what at hand, and what came out."""
    minutes, machine, versions = content["minutes"], content["machine"], content["installed"]
    cached = "nothing cached"
    if content["other_sources"]:
        cached += f", but pip is set up there to look at {' and at '.join(content['other_sources'])} as well"
    torch, build, _ = versions["torch"].partition("+cpu")
    demo = content["demo"]
    told = (
        f"From `git clone` to the first recommendation: {minutes['total']:.1f} minutes on {content['cores']} cores of "
        f"{machine['processor']}, {minutes['install']:.1f} of them to install and {minutes['fetch and train']:.1f} to "
        f"fetch and train; {cached}. Python {machine['python']}, torch {torch}{' (its CPU build)' if build else ''}, "
        f"transformers {versions['transformers']}. The demo's {METRIC} over {demo['users']} users is "
        f"{demo['run'][METRIC]:.4f}, that of popularity {demo['popularity'][METRIC]:.4f}."
    )
    return textwrap.fill(told, 120, break_long_words=False, break_on_hyphens=False)


def write_readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Put the sentence between its two marks; nothing where nothing was measured."""
    head, opens, rest = readme.read_text(encoding="utf-8").partition(OPENS)
    _, closes, tail = rest.partition(CLOSES)
    if not (opens and closes):
        sys.exit(f"error: {readme} has no {OPENS} with {CLOSES} after it: put both where the sentence belongs")
    path = results / "first_contact.json"
    told = sentence(json.loads(path.read_text(encoding="utf-8"))) + "\n" if path.exists() else ""
    write_atomic(readme, f"{head}{opens}\n{told}{closes}{tail}".encode())


def refuse_a_busy_machine(load: float, cores: int) -> None:
    """End where something else runs: its share would be in the figure."""
    if load > BUSY * cores:
        sys.exit(f"error: {load:.1f} processes ran here in the last minute. Measure when nothing else runs.")


def main() -> None:
    """Measure, and write the result and the sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip-args", default="", help="As PIP_ARGS of make.")
    chosen = parser.parse_args()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    refuse_a_busy_machine(load, cores)
    with tempfile.TemporaryDirectory() as folder:
        minutes = measure(ROOT, Path(folder), chosen.pip_args)
        clone = Path(folder) / "pplr"
        versions = installed(clone)
        settings = pip_settings(clone / ".venv" / "bin" / "python", surroundings(Path(folder)))
        demo = demo_result(clone / RUN_DIR)
    content = {
        "command": "python -m benchmarks.first_contact",  # without --pip-args, which may name a host
        "rows": [],
        "minutes": minutes,
        "cores": cores,
        "load_before": load,
        "installed": versions,
        "other_sources": other_sources(settings, chosen.pip_args),
        "demo": demo,
        "notes": [f"{step}: {took:.2f} min" for step, took in minutes.items()]
        + ["Nothing in pip's cache or pplr's; cloned from the same disk; no model hub."],
    }
    write_result("first_contact", content)
    write_readme()
    print("wrote README.md")


if __name__ == "__main__":
    main()
