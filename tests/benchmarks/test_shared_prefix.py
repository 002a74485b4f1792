"""A batch in one row beside padded rows, on a tiny model: what is told of it."""

from __future__ import annotations

import pytest

from benchmarks import shared_prefix
from pplr.stages.client_model import ClientModel


@pytest.fixture(autouse=True)
def _cuts(small_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "CUTS", {"uncut": None, "cut": small_config().cut})


def test_what_is_measured_has_rows_and_notes(small_config, backbone) -> None:
    told = shared_prefix.measure(small_config(), backbone, 2, 4)
    assert [row["name"].rsplit(", ", 1)[1] for row in told["rows"][:2]] == ["uncut", "cut"]
    crossed = told["bytes_across_the_cut"]
    assert told["rows"][2]["ratio"] == crossed["one row"] / crossed["padded"] < 0.9
    assert crossed["one row"] == 4 * told["places"]["one row"] * backbone.hidden_size * 4
    assert told["check"] < 1e-4
    assert told["places"]["one row"] < told["places"]["padded"]
    for own in told["tokens_per_second"].values():
        assert all(rate["count"] == 2 for rate in own.values())


def test_ways_that_train_otherwise_are_refused(small_config, backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ClientModel.train_loss

    def wrong(model, batch, seed):
        return right(model, batch, seed) * (1.1 if batch.row is not None else 1)

    monkeypatch.setattr(ClientModel, "train_loss", wrong)
    with pytest.raises(SystemExit, match="do not train alike"):
        shared_prefix.measure(small_config(), backbone, 1, 4)
