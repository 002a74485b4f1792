"""What SASRec is given to train on, and which settings are refused. Its training is RecTools' own."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.sasrec import add_arguments, task
from pplr.errors import ConfigError
from pplr.runtimes.run_data import RunData, load_run_data
from pplr.testing import refuses


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def data(small_config) -> RunData:
    return load_run_data(small_config("data.holdout.kind=leave_one_out"))


def test_it_sees_the_train_part_and_the_validation_targets_of_those_who_validate(data) -> None:
    told = task(data, [3], arguments())
    assert told["train"] == [own.tolist() for own in data.holdout.train]
    cases = {case.user: case for own in data.validation.values() for case in own}
    assert 0 < len(cases) < len(told["validation"])  # some users only
    assert {user for user, target in enumerate(told["validation"]) if target is not None} == set(cases)
    assert all(told["validation"][user] == case.targets[0] for user, case in cases.items())


def test_test_targets_are_no_part_of_it(data) -> None:
    told = task(data, [3], arguments())
    cases = {case.user: case for own in data.test.values() for case in own}
    assert set(told["test_histories"]) == set(cases)
    for user, case in cases.items():
        assert not set(case.targets) & set(told["test_histories"][user])
        assert set(told["test_histories"][user]) == set(case.seen)


def test_every_setting_is_tried_with_the_loss_that_is_asked_for(data) -> None:
    told = task(data, [3], arguments("--loss", "gBCE", "--negatives", "7", "--train-batch", "5", "--widths", "8", "16"))
    assert len(told["settings"]) == 2 * 2 * 2
    assert all(own["loss"] == "gBCE" and own["n_negatives"] == 7 and own["batch_size"] == 5 for own in told["settings"])
    assert {own["n_factors"] for own in told["settings"]} == {8, 16}


@pytest.mark.parametrize("given", [("--negatives", "7"), ("--loss", "gBCE")])
def test_negatives_go_with_a_sampled_loss_alone(data, given) -> None:
    with refuses(ConfigError, "--negatives"):
        task(data, [3], arguments(*given))
