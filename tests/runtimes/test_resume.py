"""A run that is stopped, killed or damaged and goes on ends with the bytes of one that was never disturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pplr.config_files import load_config
from pplr.errors import CheckpointError, PplrError, RunError, StorageError
from pplr.federation.checkpoints import FORMAT
from pplr.progress import Silent
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run

ROUNDS = 3
SETTINGS = (
    f"federation.rounds={ROUNDS}",
    "adapter.dropout=0.2",
    "run.keep_rounds=true",
    "evaluation.test_users=3",
    "evaluation.beams=1",
    "evaluation.max_new_tokens=2",
    "evaluation.validation_users=1",
    "training.samples=12",
)


def outcome(folder):
    """Everything that must not depend on whether a run was disturbed, which is all but its times."""

    def timeless(record):
        rows = {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in record["clients"].items()}
        return record | {"clients": rows}

    bytes_of = {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in ("clients/*/*", "rounds/*/*/*", "checkpoints/*/*.safetensors", "evaluation.json", "config.yaml")
        for path in folder.glob(pattern)
    }
    states = [json.loads(path.read_text()) for path in sorted(folder.glob("checkpoints/*/state.json"))]
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "bytes": bytes_of,
        "rounds": [timeless(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()],
        "states": [state | {"records": [timeless(record) for record in state["records"]]} for state in states],
        "metrics": {name: value for name, value in metrics.items() if "second" not in name},
        "others": sorted(path.name for path in folder.iterdir()),
    }


class StopAfter(Silent):
    """Stops as Ctrl-C does, when a server round has been told; hears notes."""

    def __init__(self, server_round=None):
        self.notes = []
        self._server_round = server_round

    def note(self, line):
        self.notes.append(line)

    def server_round(self, record):
        if record["server_round"] == self._server_round:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(*SETTINGS)


@pytest.fixture(scope="module")
def expected(finished):
    return outcome(finished(*SETTINGS).folder)


@pytest.fixture
def stopped(tmp_path, config, backbone):
    """A run that was stopped after its second server round, with two checkpoints."""
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", progress=StopAfter(2), backbone=backbone)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["000001", "000002"]
    return tmp_path / "run"


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(stopped, config, expected, backbone):
    assert not (stopped / "clients").exists()
    progress = StopAfter()
    run = train(config, stopped, resume=True, progress=progress, backbone=backbone)
    assert outcome(stopped) == expected
    assert progress.notes == [f"going on after server round 2 of {ROUNDS}"]
    assert run.metrics["seconds"]["total"] is None  # the time before it was stopped was not measured


@pytest.mark.parametrize("setting", ["training.optimizer_state=reset", "federation.method=fedprox", "cut=null"])
def test_so_it_does_with_other_settings(tmp_path, small_config, backbone, finished, setting):
    with pytest.raises(KeyboardInterrupt):
        train(small_config(*SETTINGS, setting), tmp_path / "run", progress=StopAfter(1), backbone=backbone)
    train(small_config(*SETTINGS, setting), tmp_path / "run", resume=True, backbone=backbone)
    assert outcome(tmp_path / "run") == outcome(finished(*SETTINGS, setting).folder)


def test_the_optimizer_really_goes_on(stopped, config, expected, backbone, monkeypatch):
    """Were its moments forgotten, the bytes would differ: so their equality elsewhere says something."""
    monkeypatch.setattr("pplr.stages.client_model.ClientModel.restore_optimizer", lambda *_: None)
    train(config, stopped, resume=True, backbone=backbone)
    assert outcome(stopped)["bytes"] != expected["bytes"]


def test_a_finished_run_goes_on_to_the_same_end(stopped, config, expected, backbone):
    for _ in range(2):
        train(config, stopped, resume=True, backbone=backbone)
        assert outcome(stopped) == expected


def test_resuming_where_nothing_is_begins(tmp_path, config, expected, backbone):
    train(config, tmp_path / "run", resume=True, backbone=backbone)
    assert outcome(tmp_path / "run") == expected


def test_without_resume_nothing_is_touched(stopped, config, backbone):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"holds this run already. Go on with --resume"):
        train(config, stopped, backbone=backbone)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


# -- damage -----------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["client-1.safetensors", "best-0.safetensors", "state.json", "manifest.json"])
def test_after_damage_the_checkpoint_before_leads_to_the_same_end(stopped, config, expected, backbone, file):
    path = stopped / "checkpoints" / "000002" / file
    if file == "manifest.json":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        flip(path)
    progress = StopAfter()
    train(config, stopped, resume=True, progress=progress, backbone=backbone)
    assert outcome(stopped) == expected
    assert any("000002" in note and "The one before it is used." in note for note in progress.notes)
    assert f"going on after server round 1 of {ROUNDS}" in progress.notes


def test_when_all_checkpoints_are_damaged_the_run_cannot_go_on(stopped, config, backbone):
    for path in (stopped / "checkpoints").glob("*/client-0.safetensors"):
        flip(path)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole. Start again with another"):
        train(config, stopped, resume=True, backbone=backbone)


def test_a_checkpoint_of_a_newer_version_is_left_alone(stopped, config, backbone):
    path = stopped / "checkpoints" / "000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    before = {path: path.read_bytes() for path in (stopped / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"format {FORMAT + 1}, newer than {FORMAT}. Update pplr"):
        train(config, stopped, resume=True, backbone=backbone)
    assert {path: path.read_bytes() for path in (stopped / "checkpoints").rglob("*") if path.is_file()} == before


def test_a_run_of_another_configuration_is_not_gone_on_with(stopped, config, backbone):
    other = load_config(stopped / "config.yaml", ["federation.heating_scale=null"])
    with pytest.raises(RunError, match=r"another configuration \(federation.heating_scale is 0.7 there and None here"):
        train(other, stopped, resume=True, backbone=backbone)


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [("tiny.item", "Elm", "Elms", "catalog"), ("tiny.inter", "t0\t0", "t9\t0", "holdout")],
)
def test_a_run_on_other_data_is_not_gone_on_with(tmp_path, config, backbone, data_folder, file, old, new, changed):
    for path in data_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = load_config(overrides=[f"data.path={tmp_path}", *_flat(config, "data.path")])
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", progress=StopAfter(1), backbone=backbone)
    content = (tmp_path / file).read_text()
    assert content.count(old) == 1
    (tmp_path / file).write_text(content.replace(old, new))
    with pytest.raises(RunError, match=rf"was begun with another {changed}.*Put the data and the model back"):
        train(config, tmp_path / "run", resume=True, backbone=backbone)
    assert open_run(tmp_path / "run").provenance["seed"] == 0


def _flat(config, *but):
    """Write a configuration as overrides."""

    def walk(value, place):
        if isinstance(value, dict) and value:
            for key, own in value.items():
                yield from walk(own, f"{place}.{key}".strip("."))
        elif place not in but:
            yield f"{place}={json.dumps(value)}"

    return list(walk(config.model_dump(mode="json"), ""))


@pytest.mark.parametrize("number", [1, 8, 25])
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(
    tmp_path, config, expected, backbone, monkeypatch, number
):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left while writing .*Free some space, then go on with --resume"):
        train(config, tmp_path / "run", backbone=backbone)
    monkeypatch.undo()
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))
    train(config, tmp_path / "run", resume=True, backbone=backbone)
    assert outcome(tmp_path / "run") == expected


# -- kill -9 ----------------------------------------------------------------------------------------------------


class Driver:
    """A process that trains in forks of its own."""

    def __init__(self, folder):
        self.folder = folder
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.references = {}
        self.runs = 0

    def train(self, config, run_dir, *, resume=False, **death):
        path = self.folder / "config.yaml"
        path.write_text(config.to_yaml())
        job = {"config": str(path), "run_dir": str(run_dir), "resume": resume, **death}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def fresh(self):
        self.runs += 1
        return self.folder / f"run {self.runs}"

    def reference(self, config):
        """Train undisturbed, once for each configuration: its outcome, its calls to the disk, its seconds."""
        key = config.to_yaml()
        if key not in self.references:
            folder = self.fresh()
            told = self.train(config, folder)
            assert told["error"] is None, told["error"]
            seconds = json.loads((folder / "metrics.json").read_text())["seconds"]["total"]
            self.references[key] = outcome(folder), told["calls"], seconds
        return self.references[key]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    made = Driver(tmp_path_factory.mktemp("killed"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(timeout=30) == 0
    made.process.stdout.close()


@pytest.fixture(scope="module")
def killed_config(request, small_config):
    return small_config(*SETTINGS, f"federation.method={request.param}")


def _went_on(driver, config, folder):
    told = driver.train(config, folder, resume=True)
    assert told["error"] is None, told["error"]
    assert outcome(folder) == driver.reference(config)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_config", "share"),
    [*(("pplr", share) for share in (0.0, 0.15, 0.4, 0.65, 0.9)), ("ditto", 0.2), ("ditto", 0.7)],
    indirect=["killed_config"],
)
def test_a_run_killed_between_two_calls_to_the_disk_goes_on(driver, killed_config, share):
    _, calls, _ = driver.reference(killed_config)
    at = 1 + int(share * (calls - 1)) + random.Random(f"{share}").randrange(max(1, calls // 12))
    folder = driver.fresh()
    told = driver.train(killed_config, folder, die_at=at)
    assert told["signal"] == signal.SIGKILL
    _went_on(driver, killed_config, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_config", "share"), [("pplr", 0.3), ("pplr", 0.6), ("ditto", 0.5)], indirect=["killed_config"]
)
def test_a_run_killed_at_any_time_goes_on(driver, killed_config, share):
    seconds, told = share * driver.reference(killed_config)[2], {"signal": None}
    while told["signal"] is None:  # once, unless the machine has become faster
        folder = driver.fresh()
        told = driver.train(killed_config, folder, kill_after_s=seconds)
        seconds /= 2
    _went_on(driver, killed_config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed_config", ["pplr", "ditto"], indirect=True)
def test_a_run_killed_again_and_again_comes_to_its_end(driver, killed_config):
    folder, kills = driver.fresh(), 0
    for at in range(2, 400, 23):
        told = driver.train(killed_config, folder, resume=True, die_at=at)
        if told["signal"] is None:
            break
        kills += 1
    assert kills >= 3
    assert told["error"] is None, told["error"]
    assert outcome(folder) == driver.reference(killed_config)[0]


@pytest.mark.slow
@pytest.mark.parametrize("killed_config", ["pplr"], indirect=True)
def test_a_killed_run_is_still_a_run_folder(driver, killed_config):
    _, calls, _ = driver.reference(killed_config)
    folder = driver.fresh()
    driver.train(killed_config, folder, die_at=calls // 2)
    left = open_run(folder)
    assert left.config == killed_config
    assert left.metrics is None
    with pytest.raises(PplrError, match="--resume"):
        left.recommend(user="u4")
