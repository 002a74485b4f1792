"""A run's operations, worked out at its end, against those that torch counts while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pplr.federation.client import FederatedClient
from pplr.runtimes.in_process import train
from pplr.runtimes.told_flops import summed_flops, trained_rounds
from pplr.runtimes.training_flops import is_worked_out
from pplr.testing.checks import counted_operations

ALONE = ("training.batch_size=1", "evaluation.floors=[]", "evaluation.validation_metric=loss", "training.samples=9")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("training.local_epochs=2", "federation.rounds=1", "federation.method=ditto"),
        ("federation.method=centralized", "federation.rounds=1"),
        ("cut.input_layers=0", "federation.rounds=1"),
        ("cut=null", "federation.rounds=1", "adapter.kind=full"),
        ("federation.participation=0.4",),
    ],
    ids=lambda own: " ".join(own) or "pplr",
)
def test_both_sides_together_are_what_training_did(
    tmp_path: Path, small_config: Any, backbone: Any, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    counters = []
    plain = FederatedClient.train

    def counted(self: FederatedClient, *args: Any) -> Any:
        with counted_operations() as counter:
            counters.append(counter)
            return plain(self, *args)

    monkeypatch.setattr(FederatedClient, "train", counted)
    cost = train(small_config(*ALONE, *settings), tmp_path / "run", backbone=backbone).metrics["cost"]
    total = sum(own.get_total_flops() for own in counters)
    assert cost["client"]["train_flops"] + cost["server"]["train_flops"] == total > 0
    assert cost["whole"]["train_flops"] == total


def test_an_encoder_reads_its_items_before_each_epoch(tmp_path: Path, small_config: Any, encoder_folder: Path) -> None:
    settings = (
        f"backbone.model={encoder_folder}", "backbone.name=encoder", "adapter.target_modules=[query]",
        "data.history_items=4", "federation.rounds=2", "training.samples=null", "backbone.max_tokens=160",
    )  # fmt: skip
    told = []
    for rounds in (1, 2):
        phase = f"backbone.encoder.first_phase_rounds={rounds}"
        told.append(train(small_config(*ALONE[:3], *settings, phase), tmp_path / str(rounds)))
    first, both = (run.metrics["cost"]["whole"]["train_flops"] for run in told)
    assert 0 < first < both  # the same batches; the second run's items are read once more


def test_what_private_training_takes_is_not_told(small_config: Any) -> None:
    assert is_worked_out(small_config())
    assert is_worked_out(small_config("privacy.states.clip_norm=1.0"))
    assert not is_worked_out(
        small_config("privacy.dp.noise_multiplier=1.0", "privacy.dp.sampling_rate=0.5", "privacy.dp.delta=1e-5")
    )
    learned = ("privacy.states.noise=learned", "privacy.states.code_width=2", "privacy.states.rate_weight=0.1")
    assert not is_worked_out(small_config(*learned, "backbone.name=item_vectors"))


def test_rounds_that_a_client_sat_out_do_not_count() -> None:
    trained, idle = {"seconds": 1.0}, {"validation": {"loss": 1.0}}
    records = [
        {"server_round": 1, "clients": {"a": trained, "b": idle}},
        {"server_round": 2, "clients": {"b": trained}},
        {"server_round": 3, "clients": {"a": trained, "b": trained}},
    ]
    assert trained_rounds(records, "a") == [0, 2]
    assert trained_rounds(records, "b") == [1, 2]


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    own = {"client": 1, "server": 2, "whole": 3}
    assert summed_flops([own, own]) == {"client": 2, "server": 4, "whole": 6}
    nothing = dict.fromkeys(own)
    assert summed_flops([own, None]) == summed_flops([]) == nothing
