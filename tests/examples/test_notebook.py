"""The notebook runs from top to bottom, and is stored without what it printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import pplr
from pplr.runtimes.run import open_run

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
TINY = (
    "data.source=recbole",
    "data.partition={by: column, column: region}",
    "backbone.dtype=float32",
    "backbone.keep_blocks=null",
    "federation.clients=3",
    "federation.rounds=2",
    "evaluation.test_users=6",
    "evaluation.validation_users=2",
    "runtime.threads=1",
)


def test_nothing_is_stored_of_what_a_cell_printed():
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, data_folder, model_folder):
    """In a kernel of its own; what it shows is what the run folder holds."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    settings = (*TINY, f"data.path={data_folder}", f"backbone.model={model_folder}")
    monkeypatch.setenv("PPLR_SETTINGS", shlex.join(settings))
    monkeypatch.setenv("PYTHONPATH", str(Path(pplr.__file__).parents[1]))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    outputs = [own for cell in notebook.cells if cell.cell_type == "code" for own in cell.outputs]
    figures = [own for own in outputs if own.output_type == "display_data" and "image/png" in own.data]
    told = "".join(own.text for own in outputs if own.output_type == "stream" and own.name == "stdout")
    assert len(figures) == 2
    run = open_run(tmp_path / "runs" / "notebook")
    assert len(run.rounds) == 2
    metrics = run.metrics
    shown = run.config.evaluation.validation_metric
    for label, value in (("before", metrics["before"]["overall"]), ("after", metrics["overall"])):
        assert f"{label:<12}{shown} {value[shown]:.4f}" in told
    assert "server round 2, validation" in told
    assert f"{run.rounds[0]['clients']['0']['bytes_up']:,} bytes up" in told
    user = run.assembly().data.users("0")[0]
    for found in run.recommend(user=user, count=5):
        assert f"{found.rank:>2}  {found.title}" in told
    assert json.loads((run.folder / "audit.json").read_text())["verdict"] in told
