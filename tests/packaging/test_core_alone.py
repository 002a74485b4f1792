"""Without extras the main job works, and what an extra brings says how to get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pplr.apps.command_group import EXTRAS as NAMED
from tests.packaging.core_only import closure, hidden_modules
from tests.packaging.main_job import ROOT, Step, main_job

pytestmark = pytest.mark.slow
EXTRAS = ("cryptography", "dp_accounting", "flwr", "grpc", "matplotlib", "nicegui", "prometheus_client", "ray")


@pytest.fixture(scope="module")
def steps(data_folder: Path, model_folder: Path) -> list[Step]:
    return main_job(data_folder, model_folder)


@pytest.fixture(scope="module")
def told(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands and imports gave in a process that finds the core's packages alone."""
    folder = tmp_path_factory.mktemp("core alone")
    (folder / "steps.json").write_text(json.dumps([step.arguments for step in steps]))
    own = {"PPLR_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "packaging" / "core_only.py"), "steps.json"],
        cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_packages_of_extras_are_not_found_there(told: dict[str, Any]) -> None:
    assert set(EXTRAS) <= set(told["hidden"])
    assert not {"torch", "transformers", "typer", "yaml"} & set(told["hidden"])


def test_the_main_job_works_and_every_extra_has_a_cure(told: dict[str, Any], steps: list[Step]) -> None:
    for step, done in zip(steps, told["steps"], strict=True):
        assert done["exception"] == "None", step
        assert (done["code"], step.says in done["output"]) == (step.code, True), f"{step}\n{done['output']}"
        assert step.code == 0 or done["output"].splitlines()[-1].startswith("error: "), done["output"]


def test_a_module_that_needs_an_extra_needs_one_that_the_command_line_can_name(told: dict[str, Any]) -> None:
    lacking = {module: name for module, name in told["imports"].items() if name is not None}
    unnamed = {module: name for module, name in lacking.items() if name.partition(".")[0] not in NAMED}
    assert not unnamed, f"apps/command_group.py knows no extra for what these lack: {unnamed}"


@pytest.mark.parametrize("part", ["apps.cli", "backbones", "data", "federation", "recommend", "stages", "runtimes.run"])
def test_the_parts_of_the_main_job_import_nothing_of_an_extra(told: dict[str, Any], part: str) -> None:
    own = {module: name for module, name in told["imports"].items() if module.startswith(f"pplr.{part}")}
    assert own
    assert not {module for module, name in own.items() if name is not None}


def test_what_is_hidden_is_what_no_package_of_the_core_brings() -> None:
    core = closure(["typer"])
    assert {"typer", "click", "rich"} <= core
    assert "grpcio" not in core
    found = hidden_modules(core, {"typer": ["typer"], "grpc": ["grpcio"], "both": ["grpcio", "Typer"]})
    assert found == {"grpc"}
