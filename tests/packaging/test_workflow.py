"""The workflow fits its schema, asks for no more rights than reading, and runs what contributors run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.packaging.main_job import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def fits(schema: str, path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [program, "--builtin-schema", schema, path]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflows_fit_their_schemas(schema: str, tmp_path: Path) -> None:
    assert WORKFLOWS
    for path in WORKFLOWS:
        done = fits(schema, path)
        assert done.returncode == 0, done.stdout
    wrong = read(WORKFLOWS[0])
    wrong["jobs"] = {"test": {"runs-on": "ubuntu-24.04", "step": []}}
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(wrong))
    assert fits(schema, tmp_path / "wrong.yml").returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_pins_what_it_uses(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert not any("permissions" in job for job in workflow["jobs"].values())
    for step in steps:
        if used := step.get("uses"):
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", used), used
        if used and used.startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        assert not re.search(r"\$\{\{\s*github\.(event|head_ref)", step.get("run", "")), "a title could hold commands"


def test_it_runs_what_a_contributor_runs_on_every_python() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    test = workflow["jobs"]["test"]
    assert [step for step in test["steps"] if step.get("run", "").endswith("bash .ci/run")]
    assert test["strategy"]["matrix"]["python"][0] == "3.11"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    called = {
        target
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
    }
    assert {"docs", "wheel-check"} == called
    assert called - {"docs"} <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_image_is_built_with_torch_for_cpus_and_loads_what_is_linked_with_the_system() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    steps = [step.get("run", "") for step in workflow["jobs"]["image"]["steps"]]
    (build,) = (step for step in steps if step.startswith("docker compose build"))
    (argument,) = re.findall(r"--build-arg (\w+)=\S+/cpu ", build)
    assert f"\nARG {argument}=" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    alone = [step for step in steps if step.endswith('-c "import implicit.cpu.als"')]
    assert len(alone) == 1  # in a process that loads no torch, which brings a copy of libgomp
    assert " --entrypoint python pplr " in alone[0]
