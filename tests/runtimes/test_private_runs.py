"""Whole private runs: what is spent and told, what a kill leaves, and what every method does."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pplr.apps.results import result_table
from pplr.apps.terminal import Screen, TerminalProgress
from pplr.backbones.adapters import load_adapter
from pplr.backbones.base import load_backbone
from pplr.config import BackboneConfig
from pplr.errors import ConfigError, FederationError, RunError
from pplr.privacy.accounting import epsilon_of
from pplr.progress import Silent
from pplr.recommend import private_training
from pplr.runtimes import in_process
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.identity import enroll_client, init_federation, read_server
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run
from pplr.runtimes.stage_server import StageServer
from pplr.testing import refuses, same_adapters
from tests.runtimes.test_resume import Driver, StopAfter

ROUNDS, STEPS = 3, 2
PRIVATE = (
    f"federation.rounds={ROUNDS}",
    "federation.patience=null",
    "federation.heating_scale=null",
    "federation.weighting=uniform",
    "data.catalog=all",
    "training.samples=null",
    "privacy.dp.noise_multiplier=1.0",
    "privacy.dp.sampling_rate=0.5",
    "privacy.dp.users_per_step=4",
    "evaluation.test_users=3",
    "evaluation.beams=1",
    "evaluation.max_new_tokens=2",
    "evaluation.validation_users=1",
)
SPENT = [epsilon_of([(STEPS * rounds, 0.5, 1.0)], 1e-5) for rounds in range(ROUNDS + 1)]


@pytest.fixture(autouse=True)
def _known_secret(monkeypatch):
    """Two runs are the same only if their secrets are."""
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(*PRIVATE)


def adapters(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("clients/*/*.safetensors")}
    return found | {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("checkpoints/*/*.safetensors")}


def booked(folder: Path, client: str = "0") -> list[dict]:
    return json.loads((folder / "privacy" / f"{client}.json").read_text())["booked"]


def test_whoever_trains_reads_the_word_private_beside_a_figure_alone(tmp_path, config, small_config, backbone):
    for number, own in enumerate((config, small_config())):
        told = io.StringIO()
        screen = Screen(told)
        run = train(own, tmp_path / str(number), backbone=backbone, progress=TerminalProgress(screen))
        screen.lines(result_table(run.metrics))
        lines = [line for line in told.getvalue().splitlines() if re.search(r"\bprivat", line, re.IGNORECASE)]
        assert all("ε = " in line for line in lines)
        assert len(lines) == (1 if own is config else 0)


def test_what_is_spent_is_in_every_record_in_the_metrics_and_on_the_screen(tmp_path, config, backbone):
    notes = StopAfter()
    run = train(config, tmp_path / "run", backbone=backbone, progress=notes)
    for number, record in enumerate(run.rounds, start=1):
        for own in record["clients"].values():
            assert own["epsilon"] == SPENT[number]
            assert own["loss"] is own["samples"] is own["tokens"] is own["loss_share"] is None
            assert own["seconds"] > 0
    privacy = run.metrics["privacy"]
    assert privacy["epsilon"] == dict.fromkeys("012", SPENT[-1])
    assert privacy["adjacency"] == "add or remove one user"
    assert run.metrics["seconds"]["train"] > 0
    assert run.metrics["samples_per_second"] is None
    shown = "\n".join(line.plain for line in result_table(run.metrics))
    assert f"client 2 {SPENT[-1]:.3f}, at δ = 1e-05, for each user (add or remove one user)" in shown
    assert "does not cover hidden states" in shown
    assert f"ε = {SPENT[-1]:.3f}" in notes.notes[0]
    assert len(booked(run.folder)) == ROUNDS
    assert open_run(run.folder).metrics == run.metrics


def test_without_it_there_is_no_trace_of_it(finished):
    run = finished()
    assert not (run.folder / "privacy").exists()
    assert "privacy" not in run.metrics
    assert all("epsilon" not in own for own in run.rounds[0]["clients"].values())


def test_the_adapter_that_is_kept_is_the_newest_not_one_that_validation_chose(tmp_path, small_config, backbone):
    config = small_config(*PRIVATE, "training.learning_rate=0.5")  # rounds get worse and worse
    run = train(config, tmp_path / "run", backbone=backbone)
    losses = [record["clients"]["0"]["validation"]["loss"] for record in run.rounds]
    assert min(losses) != losses[-1]
    newest = load_file(run.folder / "checkpoints" / f"{ROUNDS:06d}" / "client-0.safetensors")
    saved = load_adapter(run.folder / "clients" / "0")
    assert all(torch.equal(saved[name], newest[name]) for name in saved)


def test_a_stopped_run_goes_on_to_the_same_bytes_and_spends_nothing_twice(tmp_path, config, backbone):
    undisturbed = train(config, tmp_path / "undisturbed", backbone=backbone)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", backbone=backbone, progress=StopAfter(2))
    run = train(config, tmp_path / "stopped", resume=True, backbone=backbone)
    assert adapters(run.folder) == adapters(undisturbed.folder)
    assert run.metrics["privacy"] == undisturbed.metrics["privacy"]
    assert booked(run.folder) == booked(undisturbed.folder)


def test_another_secret_gives_another_run(tmp_path, config, backbone, monkeypatch):
    first = train(config, tmp_path / "first", backbone=backbone)
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(32))
    other = train(config, tmp_path / "other", backbone=backbone)
    assert adapters(first.folder).keys() == adapters(other.folder).keys()
    assert adapters(first.folder) != adapters(other.folder)


@pytest.mark.parametrize("at", ["after booking", "in the middle of training"])
def test_what_was_booked_before_a_crash_stays_booked(tmp_path, config, backbone, monkeypatch, at):
    """The second client crashes in the second round; by then it has paid, and pays no second time for the same."""
    undisturbed = train(config, tmp_path / "undisturbed", backbone=backbone)
    real, calls = private_training.train_privately, []

    def crash(model, *arguments, **options):
        calls.append(options["client"])
        if len(calls) == 5:
            if at == "in the middle of training":
                real(model, *arguments, **options)
            raise KeyboardInterrupt
        return real(model, *arguments, **options)

    monkeypatch.setattr("pplr.federation.client.train_privately", crash)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "crashed", backbone=backbone)
    assert [len(booked(tmp_path / "crashed", name)) for name in "012"] == [2, 2, 1]
    monkeypatch.undo()
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(99))  # it has one already
    run = train(config, tmp_path / "crashed", resume=True, backbone=backbone)
    assert adapters(run.folder) == adapters(undisturbed.folder)
    assert run.metrics["privacy"]["epsilon"] == dict.fromkeys("012", SPENT[-1])


def test_a_round_that_is_done_again_from_elsewhere_is_paid_again(tmp_path, config, backbone, monkeypatch):
    """Were the noise the same, the difference of the two would have none."""
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", backbone=backbone, progress=StopAfter(1))
    before = booked(tmp_path / "run")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pplr.federation.rounds.decide", stop)  # the second round is trained, and goes nowhere
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", resume=True, backbone=backbone)
    monkeypatch.setattr("pplr.stages.client_model.ClientModel.restore_optimizer", lambda *_: None)
    run = train(config, tmp_path / "run", resume=True, backbone=backbone)
    after = booked(run.folder)
    assert after[: len(before)] == before
    assert [row["server_round"] for row in after] == [1, 2, 2, 3]
    assert run.metrics["privacy"]["epsilon"]["0"] == epsilon_of([(STEPS * 4, 0.5, 1.0)], 1e-5) > SPENT[-1]


def test_a_run_does_not_go_on_without_its_ledger(tmp_path, config, backbone):
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", backbone=backbone, progress=StopAfter(2))
    path = tmp_path / "run" / "privacy" / "1.json"
    whole = path.read_text()
    for lost in ({"booked": json.loads(whole)["booked"][:1]}, None):
        path.unlink() if lost is None else path.write_text(json.dumps(lost))
        with refuses(RunError, "does not know of server round"):
            train(config, tmp_path / "run", resume=True, backbone=backbone)
    path.write_text(whole)
    train(config, tmp_path / "run", resume=True, backbone=backbone)


def test_a_run_over_its_budget_ends_before_it_begins_and_a_ledger_over_it_ends_a_round(
    tmp_path, small_config, backbone, monkeypatch
):
    config = small_config(*PRIVATE, f"privacy.dp.epsilon_budget={SPENT[2]}")
    with refuses(ConfigError, "epsilon_budget"):
        train(config, tmp_path / "run", backbone=backbone)
    assert not (tmp_path / "run" / "privacy").exists()
    monkeypatch.setattr(in_process, "refuse_over_budget", lambda *_: "")
    with refuses(FederationError, "server round 3 would bring"):
        train(config, tmp_path / "run", backbone=backbone)
    assert [len(booked(tmp_path / "run", name)) for name in "0"] == [2]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "settings",
    [
        ("federation.method=pplr", "federation.participation=0.4"),
        ("federation.method=fedavg", "federation.averaging=product"),
        ("federation.method=fedprox", "federation.averaging=freeze_a"),
        ("federation.method=local", "cut=null"),
        ("federation.method=centralized", "training.optimizer_state=reset"),
        ("federation.method=ditto",),
    ],
    ids=lambda settings: settings[0],
)
def test_every_method_trains_privately_and_goes_on_to_the_same_bytes(tmp_path, small_config, backbone, settings):
    config = small_config(*PRIVATE, *settings)
    run = train(config, tmp_path / "run", backbone=backbone)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", backbone=backbone, progress=StopAfter(1))
    train(config, tmp_path / "stopped", resume=True, backbone=backbone)
    assert adapters(tmp_path / "stopped") == adapters(run.folder)
    spent = run.metrics["privacy"]["epsilon"]
    assert set(spent) == ({"pooled"} if "centralized" in settings[0] else set("012"))
    assert max(spent.values()) <= SPENT[-1]


def test_what_is_exchanged_does_not_depend_on_ditto_s_personal_adapter(tmp_path, small_config, backbone, monkeypatch):
    config = small_config(*PRIVATE, "federation.method=ditto")
    run = train(config, tmp_path / "run", backbone=backbone)
    assert "not the personal adapters" in run.metrics["privacy"]["note"]
    monkeypatch.setattr("pplr.federation.methods.ditto.Ditto.personal_objective", lambda self: self.objective())
    other = train(config, tmp_path / "other", backbone=backbone)
    last = f"checkpoints/{ROUNDS:06d}/client-0.safetensors"
    both = [load_file(folder / last) for folder in (run.folder, other.folder)]
    same = {name: torch.equal(own, both[1][name]) for name, own in both[0].items()}
    assert all(equal for name, equal in same.items() if not name.startswith("personal."))
    assert not all(equal for name, equal in same.items() if name.startswith("personal."))


def test_private_training_needs_a_place_for_its_ledger(config, backbone):
    assembly = Assembly(config, Silent(), backbone)
    with refuses(ConfigError, "ledger"):
        assembly.federation()


def test_a_lie_is_refused_before_any_data_is_read(tmp_path, small_config, backbone):
    with refuses(ConfigError, "training.samples"):
        train(small_config(*PRIVATE, "training.samples=4", "data.path=/nowhere"), tmp_path / "run", backbone=backbone)


@pytest.mark.slow
def test_killed_at_any_call_to_the_disk_it_goes_on_and_has_paid_once(tmp_path_factory, config):
    """Each kill is SIGKILL; a round paid twice, or a trained round not paid, would show in the ledger."""
    driver = Driver(tmp_path_factory.mktemp("killed"))
    try:
        told = driver.train(config, driver.fresh())
        assert told["error"] is None, told["error"]
        for die_at in random.Random(0).sample(range(1, told["calls"]), 4):
            folder = driver.fresh()
            assert driver.train(config, folder, die_at=die_at)["signal"] is not None
            resume = (folder / "config.yaml").exists()
            again = driver.train(config, folder, resume=resume)
            assert again["error"] is None, again["error"]
            for name in "012":
                assert [row["server_round"] for row in booked(folder, name)] == [1, 2, 3]
    finally:
        driver.process.stdin.close()
        driver.process.wait(timeout=30)
        driver.process.stdout.close()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_over_a_stage_server_the_frozen_middle_stays_as_it_was_and_the_rest_is_as_in_one_process(
    tmp_path, small_config, model_folder
):
    config = small_config(*PRIVATE, f"backbone.model={model_folder}", "privacy.dp.freeze_middle=true")
    local = train(config, tmp_path / "local")
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "all", tmp_path / "kit")
    base = load_backbone(BackboneConfig(model=str(model_folder), dtype="float32"))
    server = StageServer(base, read_server(tmp_path / "ca"), "localhost:0")
    server.start()
    try:
        there = StageServerAt(tmp_path / "kit", f"localhost:{server.port}")
        with refuses(ConfigError, "freeze_middle"):
            train(small_config(*PRIVATE, f"backbone.model={model_folder}"), tmp_path / "lie", stage_server=there)
        remote = train(config, tmp_path / "remote", stage_server=there)
        remote.close()
    finally:
        server.stop(0.0)
    assert same_adapters(remote.folder, local.folder)
    initial, saved = local.assembly().initial, load_adapter(local.folder / "clients" / "0")
    moved = {name for name in saved if not torch.allclose(saved[name], initial[name], atol=1e-6)}
    middle = {name for name in saved if ".layers.1." in name}
    assert middle
    assert moved == saved.keys() - middle
    assert not any(saved[name].any() for name in middle if "lora_B" in name)
