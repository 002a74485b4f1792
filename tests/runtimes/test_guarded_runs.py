"""Whole runs whose states are guarded: off changes nothing, resuming gives the same bytes, every way to the server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from pplr.apps.results import result_table
from pplr.backbones.base import load_backbone
from pplr.config import BackboneConfig
from pplr.errors import ConfigError, RunError
from pplr.privacy.states import StateGuard, gaussian_epsilon
from pplr.progress import Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.identity import enroll_client, init_federation, read_server
from pplr.runtimes.in_process import train
from pplr.runtimes.stage_server import StageServer
from pplr.stages.transport import LocalTransport
from pplr.testing import refuses, same_adapters
from tests.runtimes.test_resume import SETTINGS, StopAfter, outcome

GAUSSIAN = (
    "privacy.states.clip_norm=2",
    "privacy.states.noise=gaussian",
    "privacy.states.noise_multiplier=0.1",
    "privacy.states.gradient_clip_norm=1",
    "privacy.states.gradient_noise_multiplier=0.1",
)
METRIC = ("privacy.states.noise=metric", "privacy.states.eta=20")


@pytest.fixture(autouse=True)
def _known_secret(monkeypatch):
    """Two runs are the same only if their secrets are."""
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))


@pytest.mark.parametrize("settings", [GAUSSIAN, (*METRIC, "federation.method=ditto")], ids=["gaussian", "metric"])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, small_config, backbone, settings):
    config = small_config(*SETTINGS, *settings)
    undisturbed = train(config, tmp_path / "undisturbed", backbone=backbone)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", backbone=backbone, progress=StopAfter(2))
    run = train(config, tmp_path / "stopped", resume=True, backbone=backbone)
    assert outcome(run.folder) == outcome(undisturbed.folder)


def test_nothing_is_drawn_or_kept_where_nothing_is_set(finished):
    run = finished()
    assert not (run.folder / "privacy").exists()
    assert "states" not in run.metrics
    assert run.assembly().admit("0", run.assembly().initial, "looked at").guard is None


def test_a_clip_that_no_state_reaches_changes_no_byte(tmp_path, small_config, backbone, finished):
    run = train(small_config("privacy.states.clip_norm=1e6"), tmp_path / "run", backbone=backbone)
    assert same_adapters(run.folder, finished().folder)
    assert run.metrics["overall"] == finished().metrics["overall"]
    assert not (run.folder / "privacy").exists()


def test_another_secret_gives_another_run(tmp_path, small_config, backbone, monkeypatch):
    first = train(small_config(*GAUSSIAN), tmp_path / "first", backbone=backbone)
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(32))
    other = train(small_config(*GAUSSIAN), tmp_path / "other", backbone=backbone)
    assert not same_adapters(first.folder, other.folder)


def test_everything_that_crosses_has_been_guarded(tmp_path, small_config, backbone, monkeypatch):
    """What the server gets, in training, evaluation, recommendation and generation, is what a guard gave out."""
    given, got = [], {"forward": [], "decode": [], "backward": []}
    for name in ("states", "gradient"):
        real = getattr(StateGuard, name)

        def keeping(self, *arguments, real=real, **options):
            given.append(real(self, *arguments, **options))
            return given[-1]

        monkeypatch.setattr(StateGuard, name, keeping)
    for name in got:
        real = getattr(LocalTransport, name)

        def noting(self, *arguments, real=real, name=name, **options):
            if "title" not in self._client:  # of public titles
                states = arguments[1] if name == "backward" else arguments[0]
                got[name].append(any(torch.equal(states, own) for own in given[-2:]))
            return real(self, *arguments, **options)

        monkeypatch.setattr(LocalTransport, name, noting)
    run = train(small_config(*GAUSSIAN, "federation.rounds=1"), tmp_path / "run", backbone=backbone)
    counts = {name: len(own) for name, own in got.items()}
    run.recommend(client="0", history=["Ash", "Elm"], count=3)
    assert all(all(own) for own in got.values())
    assert all(counts.values())
    assert len(got["decode"]) > counts["decode"]


def test_what_is_promised_is_announced_and_told_with_figures(tmp_path, small_config, backbone):
    notes = StopAfter()
    run = train(small_config(*GAUSSIAN, "training.local_epochs=2"), tmp_path / "run", backbone=backbone, progress=notes)
    told = run.metrics["states"]
    assembly = run.assembly()
    lengths, ranked = {}, Counter()
    for samples in assembly.data.samples.values():
        for sample in samples:
            (encoded,) = assembly.encode([sample])
            lengths.setdefault(sample.user, []).append(backbone.length(encoded))
    assert told["vectors"]["pass"] == max(max(own) for own in lengths.values())
    longest = 512 + 2 * 8 + 3 * 8 + len(backbone.text_tokens(""))
    for name in assembly.trainers:
        validation = assembly.validation_samples(name)  # of which the loss is measured, in two rounds
        for sample, encoded in zip(validation, assembly.encode(validation), strict=True):
            ranked[sample.user] += 2 * backbone.length(encoded)
        ranked.update({case.user: longest for case in assembly.data.test[name]})
    assert told["vectors"]["run"] == max(4 * sum(lengths.get(user, [])) + ranked[user] for user in range(24))
    assert told["epsilon"]["states"]["pass"] == gaussian_epsilon(told["vectors"]["pass"], 0.1, 1e-5)
    assert told["summary"] in notes.notes[0]
    shown = "\n".join(line.plain for line in result_table(run.metrics))
    assert f"{told['epsilon']['states']['run']:.4g} for a run of {told['vectors']['run']} states" in shown
    assert "private" not in shown


def test_a_run_does_not_go_on_without_its_secret_and_noise_needs_one(tmp_path, small_config, backbone):
    config = small_config(*SETTINGS, *METRIC)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", backbone=backbone, progress=StopAfter(1))
    (tmp_path / "run" / "privacy" / "1.key").unlink()
    with refuses(RunError, "1.key is missing"):
        train(config, tmp_path / "run", resume=True, backbone=backbone)
    with refuses(ConfigError, "without a secret"):
        Assembly(config, Silent(), backbone).federation()


def test_two_recommendations_of_one_history_have_two_noises(tmp_path, small_config, backbone, monkeypatch):
    run = train(small_config(*METRIC, "federation.rounds=1"), tmp_path / "run", backbone=backbone)
    sent = []
    real = LocalTransport.decode

    def noting(self, states, call, cache):
        sent.append(states)
        return real(self, states, call, cache)

    monkeypatch.setattr(LocalTransport, "decode", noting)
    for _ in range(2):
        run.recommend(client="0", history=["Ash", "Elm"], count=1)
        sent.append(None)
    firsts = [sent[0], sent[sent.index(None) + 1]]
    assert firsts[0].shape == firsts[1].shape
    assert not torch.equal(*firsts)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("settings", [GAUSSIAN, METRIC], ids=["gaussian", "metric"])
def test_a_stage_server_gets_what_one_process_would_have_sent(
    tmp_path: Path, small_config, model_folder, settings
) -> None:
    config = small_config(f"backbone.model={model_folder}", *settings)
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "all", tmp_path / "kit")
    base = load_backbone(BackboneConfig(model=str(model_folder), dtype="float32"))
    server = StageServer(base, read_server(tmp_path / "ca"), "localhost:0")
    server.start()
    try:
        there = StageServerAt(tmp_path / "kit", f"localhost:{server.port}")
        remote = train(config, tmp_path / "remote", stage_server=there)
        remote.close()
    finally:
        server.stop(0.0)
    local = train(config, tmp_path / "local")
    assert same_adapters(remote.folder, local.folder)
    assert remote.metrics["overall"] == local.metrics["overall"]
