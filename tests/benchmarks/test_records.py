from __future__ import annotations

import numpy as np
import pytest

from benchmarks.records import (
    evaluation_of,
    first_difference,
    read_record,
    record_of,
    regroup,
    settings_of,
    write_record,
)
from pplr.config_files import load_config
from pplr.data.prompts import Case
from pplr.errors import RunError
from pplr.testing import refuses


def test_a_record_holds_what_a_run_measured(finished, tmp_path) -> None:
    run = finished("evaluation.cutoffs=[10]", "evaluation.test_users=null")
    record = record_of(run)
    assert record["overall"]["ndcg@10"] == pytest.approx(run.metrics["overall"]["ndcg@10"], abs=1e-6)
    assert record["spread"]["recall@10"]["gap"] == pytest.approx(run.metrics["spread"]["recall@10"]["gap"], abs=1e-6)
    assert record["holdout_sha256"] == run.provenance["holdout_sha256"]
    assert len(record["rounds"]) == len(run.rounds)
    assert set(record["rounds"][0]) == {"loss", "heating", "similarity"}
    write_record(tmp_path / "kept.json", record)
    found, whole = evaluation_of(read_record(tmp_path / "kept.json")), run.evaluation()
    assert found.users.tolist() == whole.users.tolist()
    assert found.client_of == whole.client_of
    for metric, values in found.values.items():
        np.testing.assert_allclose(values, whole.values[metric], atol=1e-6)
    assert all(any(own) for own in record["hits"].values())


def test_a_pooled_model_is_measured_by_another_partition(finished) -> None:
    run = finished("evaluation.cutoffs=[10]", "evaluation.test_users=null")
    record, whole = record_of(run), run.evaluation()
    cases = [Case(int(user), (0,), (1,), (0,)) for user in whole.users]
    test = {"a": cases[::2], "b": cases[1::2], "c": []}
    found = regroup(record, run.config, test, "other")
    by_user = dict(zip(whole.users.tolist(), whole.values["ndcg@10"].tolist(), strict=True))
    for name, own in test.items():
        assert found["tested"][name] == [case.user for case in own]
        assert found["clients"][name]["users"] == len(own)
        if own:
            expected = np.mean([by_user[case.user] for case in own])
            assert found["clients"][name]["ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert found["overall"] == record["overall"]
    assert found["partition_sha256"] == "other"
    with pytest.raises(Exception, match="tested by this partition"):
        regroup(record, run.config, {"a": cases[:3]}, "other")


def test_what_a_result_depends_on_leaves_out_where_it_runs() -> None:
    one = settings_of(load_config(overrides=["runtime.threads=1", "federation.rounds=7"]))
    other = settings_of(load_config(overrides=["runtime.threads=2", "federation.rounds=7"]))
    assert one == other == {"federation": {"rounds": 7}}
    assert first_difference(one, other) is None
    assert first_difference(one, {"federation": {"rounds": 8}}) == "federation.rounds is 7 there and 8 here"
    assert first_difference({}, one) == "federation.rounds is at its default there and 7 here"


def test_what_is_no_record_is_refused(tmp_path) -> None:
    (tmp_path / "x.json").write_text("{")
    with refuses(RunError, "is no record of a run"):
        read_record(tmp_path / "x.json")
