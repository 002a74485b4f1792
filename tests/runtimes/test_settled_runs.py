"""Runs of ``item_vectors`` whose states are codes, or whose input stage settles: every way to the same bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pplr.backbones.base import load_backbone
from pplr.config import BackboneConfig
from pplr.errors import ConfigError
from pplr.privacy.states import gaussian_epsilon
from pplr.progress import Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.audit_settings import make_settings
from pplr.runtimes.auditing import audit_run
from pplr.runtimes.identity import enroll_client, init_federation, read_server
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run
from pplr.runtimes.stage_server import StageServer
from pplr.stages.transport import LocalTransport
from pplr.testing import refuses, same_adapters
from tests.runtimes.test_item_vector_runs import config  # noqa: F401
from tests.runtimes.test_resume import StopAfter, outcome

LEARNED = ("privacy.states.noise=learned", "privacy.states.code_width=4", "privacy.states.rate_weight=0.01")
GAUSSIAN = (
    "privacy.states.clip_norm=2",
    "privacy.states.noise=gaussian",
    "privacy.states.noise_multiplier=0.1",
    "privacy.states.settle_rounds=1",
)
BOTH = (*LEARNED, "privacy.states.settle_rounds=1")
DROPPING = ("adapter.dropout=0.2", "backbone.item_vectors.dropout=0.2", "federation.rounds=3")


@pytest.fixture(autouse=True)
def _known_secret(monkeypatch):
    """Two runs are the same only if their secrets are."""
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))


@pytest.mark.parametrize("settings", [LEARNED, GAUSSIAN, BOTH], ids=["learned", "settled", "both"])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, config, settings):  # noqa: F811
    own = config(*settings, *DROPPING, "run.keep_rounds=true")
    undisturbed = train(own, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", progress=StopAfter(2))
    run = train(own, tmp_path / "stopped", resume=True)
    assert outcome(run.folder) == outcome(undisturbed.folder)


def test_a_settled_input_stage_changes_no_more_and_the_others_do(tmp_path, config):  # noqa: F811
    run = train(config(*BOTH, *DROPPING, "run.keep_rounds=true"), tmp_path / "run")
    first, last = (load_file(run.folder / "rounds" / number / "0" / "mixed.safetensors") for number in ("1", "3"))
    local = load_file(run.folder / "rounds" / "1" / "0" / "local.safetensors")
    assert not torch.equal(local["item_in.weight"], first["item_in.weight"])  # the round before was mixed
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert not {name for name in moved if name.startswith(("item_in", "cut.")) or ".layers.0." in name}
    assert any(".layers.1." in name for name in moved)
    assert "item_out.state.weight" in moved


def _sent(monkeypatch):
    """Keep what each client's model sends, by whom."""
    sent = {}
    real = LocalTransport.forward

    def noting(self, states, lengths, call, *, keep_as):
        if "title" not in self._client and "item texts" not in self._client:
            rows = [own[:length].clone() for own, length in zip(states, lengths.tolist(), strict=True)]
            sent.setdefault(self._client, []).append(rows)
        return real(self, states, lengths, call, keep_as=keep_as)

    monkeypatch.setattr(LocalTransport, "forward", noting)
    return sent


def test_a_settled_history_crosses_as_the_same_bytes_however_it_is_batched(tmp_path, config, monkeypatch):  # noqa: F811
    sent = _sent(monkeypatch)
    once = train(config(*BOTH, *DROPPING, "federation.rounds=1"), tmp_path / "once")
    fresh = len({row.numpy().tobytes() for rows in sent["0"] for row in rows})
    sent.clear()
    train(config(*BOTH, *DROPPING, "training.local_epochs=2"), tmp_path / "more")
    samples = len(once.assembly().samples("0"))
    cases = len(once.assembly().data.validation["0"])
    kinds = {row.numpy().tobytes() for rows in sent["0"] for row in rows}
    crossings = sum(len(rows) for rows in sent["0"])
    assert fresh == samples + cases  # before it settles
    assert crossings == 3 * (2 * samples + cases)
    assert len(kinds) <= 2 * samples + cases + samples + cases


def test_equal_histories_of_two_users_have_two_noises_and_nobodys_has_a_new_one_each_time(tmp_path, config):  # noqa: F811
    run = train(config(*BOTH), tmp_path / "run")
    parts = run.assembly(Silent())
    model = parts.admit("0", parts.initial, "looked at")
    assert model.has_settled
    batch = parts.backbone.pad([(1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3)])
    rows = model._settled(replace(batch, owners=torch.tensor([4, 4, 5, -1])))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[3])
    alone = model._settled(replace(parts.backbone.pad([(1, 2, 3)]), owners=torch.tensor([-1])))
    assert not torch.equal(alone[0], rows[3])
    longer = model._settled(replace(parts.backbone.pad([(1, 2, 3, 4)]), owners=torch.tensor([4])))
    assert torch.equal(longer[0, :3], rows[0])
    other = model._settled(replace(parts.backbone.pad([(5, 2, 3, 4)]), owners=torch.tensor([4])))
    assert (longer[0] - other[0]).abs().min() > 0
    parts.close()


def test_what_crosses_again_is_counted_once(tmp_path, config):  # noqa: F811
    settings = (*GAUSSIAN, "federation.rounds=3", "training.local_epochs=2")
    run = train(config(*settings), tmp_path / "run")
    told, assembly = run.metrics["states"], run.assembly()
    lengths, ranked = {}, Counter()
    for name in assembly.trainers:
        for sample in assembly.samples(name):
            (encoded,) = assembly.encode([sample])
            lengths.setdefault(sample.user, []).append(assembly.backbone.length(encoded))
        ranked.update({case.user: 2 * len(case.history) for case in assembly.data.validation[name]})
        ranked.update({case.user: len(case.history) for case in assembly.data.test[name]})
    assert told["vectors"]["run"] == max((2 + 1) * sum(own) + ranked[user] for user, own in lengths.items())
    assert told["epsilon"]["states"]["run"] == gaussian_epsilon(told["vectors"]["run"], 0.1, 1e-5)
    assert "the same for the same history after round 1" in told["summary"]


def test_an_audit_sees_no_more_in_many_passes_than_differ(tmp_path, config):  # noqa: F811
    run = train(config(*BOTH), tmp_path / "run")
    settings = make_settings(attacks=["posterior_matching"], knowledge=["own"], users=4, passes=[9, 12], guards=[])
    told = audit_run(open_run(run.folder), settings)
    first, last = (found["audits"][0]["item_f1"] for found in told["settings"])
    assert first == last
    assert "codes of 4 numbers" in told["guard"]
    assert told["settings"][0]["worth"]["mean"] == run.metrics["overall"]["ndcg@3"]
    other = make_settings(guards=[["noise=learned", "code_width=4", "rate_weight=0.5"]])
    with refuses(ConfigError, "not trained with them"):
        audit_run(run, other)


@pytest.mark.parametrize("settings", [LEARNED, BOTH], ids=["learned", "both"])
def test_a_stage_server_gets_what_one_process_would_have_sent(tmp_path, config, model_folder, settings):  # noqa: F811
    own = config(*settings, *DROPPING)
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "all", tmp_path / "kit")
    base = load_backbone(BackboneConfig(model=str(model_folder), dtype="float32"))
    server = StageServer(base, read_server(tmp_path / "ca"), "localhost:0")
    server.start()
    try:
        remote = train(
            own, tmp_path / "remote", stage_server=StageServerAt(tmp_path / "kit", f"localhost:{server.port}")
        )
        remote.close()
    finally:
        server.stop(0.0)
    local = train(own, tmp_path / "local")
    assert same_adapters(remote.folder, local.folder)
    assert remote.metrics["overall"] == local.metrics["overall"]
