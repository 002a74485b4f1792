"""The command line in processes of its own: train, stop, go on, recommend, evaluate, compare; and a real model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import pplr
from pplr.apps.cli import app
from pplr.backbones.base import load_backbone
from pplr.config import AdapterConfig, BackboneConfig, TrainingConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.errors import BackboneError, SourceError
from pplr.recommend.training import evaluation_loss, train_locally
from pplr.runtimes.in_process import train
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

pytestmark = pytest.mark.slow

LIMIT_S = 600
"""A process that takes so long hangs."""
SETTINGS = (
    "backbone.max_tokens=256",
    "backbone.prompt.instruction=Name the next.",
    "federation.rounds=10",
    "federation.patience=null",
    "evaluation.max_new_tokens=4",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_config, model_folder):
    """A folder with a configuration, and a way to call the command line in it."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = small_config(f"backbone.model={model_folder}", *SETTINGS)
    (folder / "trees.yaml").write_text(config.to_yaml())
    environment = os.environ | {
        "PPLR_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(pplr.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "pplr.apps.cli", *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return SimpleNamespace(folder=folder, config=config, start=start, environment=environment)


def ended(process):
    out, err = process.communicate(timeout=LIMIT_S)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def started(place):
    """A second run, by another method, that trains while the first is looked at."""
    return place.start("train", "trees.yaml", "--set", "federation.method=local", "--set", "federation.rounds=1",
                       "--run-dir", "other")  # fmt: skip


@pytest.fixture(scope="module")
def stopped(place, started):
    """What a training said that Ctrl-C stopped in its second server round or soon after."""
    process = place.start("train", "trees.yaml")
    told = place.folder / "runs" / "trees" / "rounds.jsonl"
    until = time.monotonic() + LIMIT_S
    while not (told.exists() and told.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = ended(process)
    return SimpleNamespace(**vars(said), rounds=len(told.read_text().splitlines()))


@pytest.fixture(scope="module")
def resumed(place, stopped):
    """What the command said that Ctrl-C told to go on with."""
    command = shlex.split(re.search(r"Go on with: (pplr .*)", stopped.err).group(1))
    return ended(place.start(*command[1:]))


@pytest.fixture(scope="module")
def other(started):
    """What the second training said."""
    return ended(started)


@pytest.fixture(scope="module")
def asked(place, resumed, other):
    """What the finished runs answered, asked in this process: each start of Python takes seconds."""
    before = json.loads((place.folder / "runs" / "trees" / "metrics.json").read_text())

    def ask(*arguments):
        with contextlib.chdir(place.folder), mock.patch.dict(os.environ, place.environment):
            result = CliRunner().invoke(app, arguments)
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    told = {
        "recommend": ask("recommend", "runs/trees", "--client", "0", "--history", "Oak; Elm", "--count", "4"),
        "compare": ask("compare", "runs/trees", "other", "--metric", "ndcg@5", "--samples", "200"),
        "evaluate": ask("evaluate", "runs/trees"),
    }
    return SimpleNamespace(before=before, **told)


def test_ctrl_c_ends_a_training_cleanly_and_says_how_to_go_on(stopped):
    assert stopped.code == 130
    assert 1 <= stopped.rounds < 10
    assert "Traceback" not in stopped.err
    assert "pplr train trees.yaml --run-dir runs/trees --resume" in stopped.err


def test_the_command_it_named_ends_with_the_bytes_of_a_run_that_was_never_stopped(place, stopped, resumed, tmp_path):
    assert resumed.code == 0, resumed.err
    assert "going on after server round" in resumed.out
    whole = train(place.config, tmp_path / "whole")
    run = pplr.open_run(place.folder / "runs" / "trees")
    files = sorted(path.relative_to(whole.folder) for path in whole.folder.glob("clients/*/*"))
    assert len(files) == 6
    assert all((run.folder / file).read_bytes() == (whole.folder / file).read_bytes() for file in files)
    assert run.metrics["overall"] == whole.metrics["overall"]
    assert len(run.rounds) == 10


def test_train_prints_rounds_and_figures(place, other):
    assert other.code == 0, other.err
    assert "server round 1 of 1" in other.out
    run = pplr.open_run(place.folder / "other")
    assert "run folder: other" in other.out
    assert run.metrics["method"] == "local"
    for name in ("recall@5", "ndcg@5"):
        assert name in other.out


def test_recommend_prints_titles_that_are_new(place, asked):
    told = asked.recommend
    assert told.code == 0, told.err
    run = pplr.open_run(place.folder / "runs" / "trees")
    expected = run.recommend("0", history=["Oak", "Elm"], count=4)
    rows = [line for line in told.out.splitlines() if re.search(r"\bt\d+\b", line)]
    assert len(rows) == 4
    for row, item in zip(rows, expected, strict=True):
        assert item.title in row
        assert re.search(rf"\b{item.item_id}\b", row)


def test_evaluate_gives_the_same_figures_again(place, asked):
    assert asked.evaluate.code == 0, asked.evaluate.err
    after = json.loads((place.folder / "runs" / "trees" / "metrics.json").read_text())
    assert after["overall"] == asked.before["overall"]
    assert after["clients"] == asked.before["clients"]
    assert after["seconds"]["evaluate"] != asked.before["seconds"]["evaluate"]


def test_compare_puts_runs_side_by_side(asked):
    told = asked.compare
    assert told.code == 0, told.err
    assert "pplr" in told.out
    assert "local" in told.out
    assert "ndcg@5" in told.out


# -- a real model -----------------------------------------------------------------------------------------------


def test_smollm2_trains_one_step_across_a_cut(shared_cache):
    """The real model, from the cache or its wheel: two samples, one step, the same loss cut and uncut."""
    try:
        backbone = load_backbone(BackboneConfig(dtype="float32", max_tokens=128))
    except (SourceError, BackboneError) as error:
        if "SHA-256" in str(error):
            raise
        pytest.skip(f"smollm2-135m is neither cached nor to be fetched: {error}")
    assert backbone.total_layers == 30
    assert backbone.hidden_size == 576
    titles = ("Toy Story (1995)", "GoldenEye (1995)", "Heat (1995)", "Twelve Monkeys (1995)")
    catalog = Catalog(("1", "2", "3", "4"), titles)
    encoded = backbone.encode([Sample(0, (0, 1), 2), Sample(1, (1, 2), 3)], catalog, 10)
    training = TrainingConfig(batch_size=2, learning_rate=1e-3, warmup_steps=0)
    told = {}
    for plan in (CutPlan(2, 1, 30), CutPlan.make(None, 30)):
        model = CutModel(backbone, plan, AdapterConfig(), training)
        client = model.client("0", model.initial_adapter(0))
        before = evaluation_loss(client, encoded, 2)
        result = train_locally(client, encoded, training, client="0", server_round=0, rounds=2, seed=0)
        told[plan] = (before, result.loss, evaluation_loss(client, encoded, 2), client.adapter())
        assert result.steps == 1
        assert told[plan][2] < before < 6  # nats per token: it knows film titles, and one step helps
    (cut, whole) = told.values()
    assert cut[:3] == pytest.approx(whole[:3], rel=1e-5)
    assert all(torch.allclose(cut[3][name], whole[3][name], atol=1e-5) for name in cut[3])
