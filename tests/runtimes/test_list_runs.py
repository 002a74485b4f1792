"""Whole runs of ``causal_lm`` in which every title is a target: cut, measured, recommending, audited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pplr.config import Config
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.audit_settings import AuditSettings
from pplr.runtimes.auditing import audit_run
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run
from pplr.runtimes.state_counts import guarded_run
from pplr.testing import same_adapters

SETTINGS = ("backbone.prompt.targets=all", "data.history_items=6", "cut.output_layers=1")


@pytest.fixture(scope="module")
def config(small_config: Callable[..., Config], model_folder: Path) -> Callable[..., Config]:
    return lambda *settings: small_config(f"backbone.model={model_folder}", *SETTINGS, *settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., Config]) -> Run:
    return train(config(), tmp_path_factory.mktemp("lists") / "run")


def test_it_trains_measures_and_recommends(run: Run) -> None:
    assert run.metrics is not None
    assert all(own["recall@3"] is not None for own in run.metrics["clients"].values())
    found = run.recommend(client="1", history=["Ash", "Elm"], count=3)
    assert [own.rank for own in found] == [1, 2, 3]
    assert not {"Ash", "Elm"} & {own.title for own in found}


def test_the_cut_changes_nothing(run: Run, tmp_path: Path, config) -> None:
    whole = train(config("cut=null"), tmp_path / "whole")
    assert same_adapters(run.folder, whole.folder)
    assert run.metrics is not None
    assert whole.metrics is not None
    assert run.metrics["overall"] == whole.metrics["overall"]


def test_every_train_title_but_a_users_first_is_a_target_once_however_few_tokens_fit(config) -> None:
    """Samples are made anew where lists are too long, and each still belongs to its user."""
    counts = []
    for tokens in (512, 225):
        assembly = Assembly(config(f"backbone.max_tokens={tokens}", "training.samples=null"), Silent())
        train_items = sum(max(0, len(own) - 1) for own in assembly.data.holdout.train)
        targets = samples = 0
        for name in assembly.trainers:
            client = assembly.federated_client(name)
            end = assembly.backbone.answer_end  # type: ignore[attr-defined]
            targets += sum(own.answer.count(end) for own in client.encoded)
            assert len(client.encoded) == len(client._owners)
            samples += len(client.encoded)
        assert targets == train_items
        counts.append(samples)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("grounding", ["l2", "trie"])
def test_of_a_guarded_run_the_states_of_every_part_of_a_list_are_counted(config, grounding) -> None:
    settings = ("backbone.max_tokens=225", "training.samples=null", f"evaluation.grounding={grounding}")
    settings = (*settings, "evaluation.max_new_tokens=1")  # fewer than a title's, which the trie does not heed
    assembly = Assembly(config(*settings, "privacy.states.clip_norm=1"), Silent())
    own = assembly.config
    written = own.evaluation.max_new_tokens
    again = len(assembly.backbone.text_tokens("")) + 3 * written  # type: ignore[attr-defined]
    if grounding == "trie":
        again, written = (
            0,
            2 + max(len(assembly.backbone.titles.tokens(title)) for title in assembly.data.dataset.catalog.titles),
        )  # type: ignore[attr-defined]
    ranked = 225 + own.evaluation.beams * written + again
    rounds, states = own.federation.rounds, Counter[int]()
    for name in assembly.trainers:
        client = assembly.federated_client(name)
        for owner, encoded in zip(client._owners, client.encoded, strict=True):
            states[owner] += own.training.local_epochs * rounds * assembly.backbone.length(encoded)
        validation = assembly.validation_samples(name)
        for sample, encoded in zip(validation, assembly.encode(validation), strict=True):
            states[sample.user] += rounds * assembly.backbone.length(encoded)
        states.update({case.user: ranked for case in assembly.data.test[name]})
    assert guarded_run(assembly)["vectors"]["run"] == max(states.values())


def test_the_audit_reads_lists(run: Run) -> None:
    told = audit_run(run, AuditSettings(attacks=("catalog_matching", "label_gradients"), knowledge=("own",), users=3))
    (setting,) = told["settings"]
    found = {own["audit"]: own for own in setting["audits"]}
    assert found["catalog_matching"]["token_recovery"]["mean"] > 0.9
    assert found["label_gradients"]["target_hit@10"]["mean"] > 0.9
