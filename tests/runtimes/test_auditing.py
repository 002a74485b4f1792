"""The audit of a finished run, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from pplr.apps.auditing import frontier, read_beside
from pplr.apps.cli import app
from pplr.errors import ConfigError, RunError
from pplr.privacy.audits import AUDITS, inverter
from pplr.recommend.evaluation import evaluate
from pplr.runtimes.audit_settings import AuditSettings, make_settings
from pplr.runtimes.auditing import audit_run
from pplr.runtimes.run import Run, open_run
from pplr.testing import refuses

ITEM_VECTORS = ("backbone.name=item_vectors", "backbone.item_vectors.width=8", "backbone.item_vectors.hidden_width=8")


@pytest.fixture(scope="module")
def item_run(finished: Callable[..., Run], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from pplr.runtimes.in_process import train

    config = finished().config.model_copy()
    raw = config.model_dump(mode="json")
    raw["backbone"] |= {
        "name": "item_vectors",
        "model": str(model_folder),
        "item_vectors": raw["backbone"]["item_vectors"] | {"width": 8, "hidden_width": 8},
    }
    return train(type(config).model_validate(raw), tmp_path_factory.mktemp("audited") / "run")


def found(content: dict, audit: str, knowledge: str, metric: str, setting: int = 0) -> float:
    (own,) = [
        own for own in content["settings"][setting]["audits"] if (own["audit"], own["knowledge"]) == (audit, knowledge)
    ]
    return float(own[metric]["mean"])


def test_a_bare_cut_is_read_and_the_file_says_so(item_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverter, "_PASSES", 16)
    monkeypatch.setattr(inverter, "_EPOCHS", 1)
    content = audit_run(item_run, AuditSettings(tuple(AUDITS), users=4, cuts=((0, 1), (1, 0)), noises=(0.0, 50.0)))
    assert content == json.loads((item_run.folder / "audit.json").read_text())
    assert len(content["settings"]) == 4
    own = {own["audit"] for own in content["settings"][0]["audits"]}
    assert own == set(AUDITS)
    assert found(content, "vocabulary_matching", "own", "token_recovery") == 1.0
    assert found(content, "vocabulary_matching", "own", "token_recovery", 2) > 0.9
    noisy = found(content, "vocabulary_matching", "own", "token_recovery", 1)
    assert noisy < 0.5
    assert content["settings"][1]["worth"]["users"] > 0
    assert content["baseline"]["item_f1"]["mean"] < 1.0
    assert content["not_tried"] == []
    assert "server" in content["verdict"]


def test_generated_titles_are_read_too(finished: Callable[..., Run]) -> None:
    content = audit_run(finished(), AuditSettings(users=3, attacks=("catalog_matching",), knowledge=("own",)))
    assert content["cut"]["input_layers"] == 1
    assert found(content, "catalog_matching", "own", "item_f1") > 0.9


def test_a_guarded_run_is_attacked_behind_its_guard_and_passes_add_up(item_run: Run, tmp_path: Path) -> None:
    from pplr.runtimes.in_process import train

    raw = item_run.config.model_dump(mode="json")
    raw["privacy"]["states"] |= {
        "clip_norm": 0.5,
        "noise": "metric",
        "eta": 8.0,
        "gradient_clip_norm": 0.1,
        "gradient_noise_multiplier": 20.0,
    }
    run = train(type(item_run.config).model_validate(raw), tmp_path / "run")
    settings = AuditSettings(
        ("vocabulary_matching", "label_gradients"), ("own",), users=4, cuts=((0, 1),), passes=(1, 40)
    )
    content = audit_run(run, settings)
    once, often = (found(content, "vocabulary_matching", "own", "token_recovery", place) for place in (0, 1))
    bare = found(audit_run(item_run, settings), "vocabulary_matching", "own", "token_recovery")
    assert once + 0.2 < often <= bare == 1.0
    for setting in content["settings"]:
        assert "metric noise η 8" in setting["guard"]
        assert {"mean", "users"} <= setting["worth_unguarded"].keys()
    assert audit_run(run, settings)["settings"][0]["worth"] == content["settings"][0]["worth"]
    assert audit_run(item_run, settings)["settings"][0]["worth_unguarded"] is None
    words = ["clip_norm=0.5", "noise=metric", "eta=8", "gradient_clip_norm=0.1", "gradient_noise_multiplier=20"]
    tried = make_settings(attacks=settings.attacks, knowledge=["own"], users=4, cuts=[(0, 1)], guards=[[], words])
    assert tried.guards[1] == run.config.privacy.states
    bare, guarded = audit_run(item_run, tried)["settings"]
    assert bare["guard"] is None
    assert guarded["guard"] == content["settings"][0]["guard"]
    assert guarded["audits"] != bare["audits"]
    with refuses(ConfigError, "passes of"):
        AuditSettings(passes=(0,))


def test_noise_brings_the_attack_that_knows_it_and_every_wire_format_is_a_setting(item_run: Run) -> None:
    settings = make_settings(knowledge=["own"], users=3, noises=[0.0, 1.0], wires=["exact", "int8"])
    content = audit_run(item_run, settings)
    places = [(found["noise"], found["wire"]) for found in content["settings"]]
    assert places == [(0.0, "exact"), (0.0, "int8"), (1.0, "exact"), (1.0, "int8")]
    for found in content["settings"]:
        names = {own["audit"] for own in found["audits"]}
        assert ("posterior_matching" in names) == (found["noise"] > 0)
        assert "inverter" not in names
    assert content["not_tried"] == [{"audit": "inverter", "knowledge": "own"}]
    bare, rounded = (found["worth"] for found in content["settings"][:2])
    assert {"low", "high", "users"} <= bare.keys() & rounded.keys()


def test_where_nothing_is_done_to_states_one_ranking_tells_what_every_cut_is_worth(
    item_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pplr.runtimes.auditing.evaluate", ranked := Mock(wraps=evaluate))
    words = {"knowledge": ["own"], "attacks": ["nearest_embedding"], "users": 3, "noises": [0.0, 1.0]}
    content = audit_run(item_run, make_settings(**words, cuts=[(0, 1), (1, 1)]))
    assert ranked.call_count == 3  # without noise once, with noise at each cut
    alone = audit_run(item_run, make_settings(**words, cuts=[(1, 1)]))
    assert content["settings"][2]["worth"] == content["settings"][0]["worth"] == alone["settings"][0]["worth"]


def test_what_the_run_was_worth_has_an_interval_from_its_own_test(item_run: Run) -> None:
    settings = make_settings(knowledge=["own"], attacks=["nearest_embedding"], users=3)
    (found,) = audit_run(item_run, settings)["settings"]
    assert found["worth"]["mean"] == item_run.metrics["overall"]["ndcg@3"]
    assert found["worth"]["low"] <= found["worth"]["mean"] <= found["worth"]["high"]
    assert "NDCG@3" in json.loads((item_run.folder / "audit.json").read_text())["verdict"]


def test_the_same_seed_gives_the_same_figures(item_run: Run) -> None:
    settings = AuditSettings(users=3, attacks=("nearest_embedding",), noises=(1.0,), seed=5)
    one, other = (audit_run(item_run, settings) for _ in range(2))
    for content in (one, other):
        content.pop("seconds")
        for setting in content["settings"]:
            for own in setting["audits"]:
                own.pop("seconds")
    assert one == other


def test_the_last_layers_alone_change_nothing_at_the_first_cut(item_run: Run) -> None:
    settings = AuditSettings(users=3, attacks=("nearest_embedding",), knowledge=("own",), cuts=((1, 0), (1, 1)))
    one, other = audit_run(item_run, settings)["settings"]
    assert one["audits"] == other["audits"]


def test_what_cannot_be_audited_is_refused(item_run: Run, tmp_path: Path) -> None:
    with refuses(ConfigError, "no audit is called 'vocabulary'"):
        AuditSettings(attacks=("vocabulary",))
    with refuses(ConfigError, "1 users"):
        AuditSettings(users=1)
    with refuses(ConfigError, "noise"):
        AuditSettings(noises=(float("nan"),))
    with refuses(ConfigError, "no knowledge is called 'all'"):
        make_settings(knowledge=["all"])
    with refuses(ConfigError, "no wire format is called 'int4'"):
        make_settings(wires=["int4"])
    (tmp_path / "config.yaml").write_text(item_run.config.to_yaml())
    with refuses(RunError, "not finished"):
        audit_run(open_run(tmp_path))


def test_the_command_prints_tables_and_ends_with_the_verdict(item_run: Run) -> None:
    arguments = ["audit", str(item_run.folder), "--users", "3", "--attack", "nearest_embedding", "--has", "own"]
    result = CliRunner().invoke(app, [*arguments, "--sweep", "--noise", "0", "--noise", "2", "--passes", "3"])
    assert "mean of 3 passes" in result.output
    assert result.exit_code == 0, result.output
    content = json.loads((item_run.folder / "audit.json").read_text())
    assert " ".join(result.stdout.split()).endswith(" ".join(content["verdict"].split()))
    assert {(own["cut"]["input_layers"], own["noise"]) for own in content["settings"]} >= {(0, 0.0), (1, 2.0), (2, 0.0)}
    assert (item_run.folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert {own["wire"] for own in content["settings"]} == {item_run.config.runtime.wire, "int8"}
    assert CliRunner().invoke(app, [*arguments, "--cut", "1"]).exit_code == 1


def test_another_run_stands_on_the_same_plot(item_run: Run, tmp_path: Path) -> None:
    arguments = ["audit", str(item_run.folder), "--users", "3", "--attack", "nearest_embedding", "--has", "own"]
    (tmp_path / "private").mkdir()
    result = CliRunner().invoke(app, [*arguments, "--beside", str(tmp_path / "private")])
    assert "was not audited" in result.output
    audit_run(item_run, make_settings(attacks=["nearest_embedding"], users=3))
    other = json.loads((item_run.folder / "audit.json").read_text())
    (tmp_path / "private" / "audit.json").write_text(json.dumps(other))
    (tmp_path / "private" / "metrics.json").write_text(json.dumps({"privacy": {"epsilon": {"0": 1.5, "1": 2.878}}}))
    result = CliRunner().invoke(app, [*arguments, "--beside", str(tmp_path / "private")])
    assert result.exit_code == 0, result.output
    (legend,) = frontier(other, beside=[read_beside(tmp_path / "private")], label="this one, users' ε 4").legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"private, users' ε 2.88", "this one, users' ε 4, k = 1"} <= set(labels)
