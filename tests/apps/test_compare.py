from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pplr.apps.compare import difference_table, run_table, spread_table
from pplr.errors import ConfigError, RunError
from pplr.runtimes.comparing import compare

Make = Callable[..., Any]


def test_the_difference_is_this_run_minus_the_first(fake_run: Make, evaluation: Make) -> None:
    rng = np.random.default_rng(0)
    base = rng.random(60)
    first = fake_run("runs/local", tested=evaluation(base))
    better = fake_run("runs/pplr", tested=evaluation(base + 0.1))
    (found,) = compare([first, better], ["ndcg@10"], samples=500)
    assert (found.run, found.metric, found.users) == ("runs/pplr", "ndcg@10", 60)
    assert found.difference == pytest.approx(0.1)
    assert found.low <= found.difference <= found.high
    assert found.p == pytest.approx(2 / 501)
    lines = difference_table([found], first).lines()
    assert lines[0].plain.startswith("against runs/local")
    assert "+0.1000" in lines[2].plain
    assert lines[0].plain.endswith("more than chance")
    assert lines[2].plain.split()[-1] == "yes"


def test_the_terminal_says_no_where_the_interval_holds_0(fake_run: Make, evaluation: Make) -> None:
    base = np.arange(20) / 20
    moved = base + np.where(np.arange(20) % 2, 0.1, -0.1)
    first, other = fake_run("runs/a", tested=evaluation(base)), fake_run("runs/b", tested=evaluation(moved))
    (found,) = compare([first, other], ["ndcg@10"], samples=200)
    assert found.low < 0 < found.high
    assert difference_table([found], first).lines()[2].plain.split()[-1] == "no"


def test_only_users_that_both_tested_are_paired(fake_run: Make, evaluation: Make) -> None:
    first = fake_run(tested=evaluation([0.0, 0.0, 1.0], users=[1, 2, 3]))
    other = fake_run("runs/b", tested=evaluation([1.0, 1.0, 0.0], users=[2, 3, 9]))
    (found,) = compare([first, other], ["recall@10"], samples=50)
    assert found.users == 2
    assert found.difference == pytest.approx(0.5)


def test_recall_and_ndcg_at_the_smallest_cutoff_are_compared_by_default(fake_run: Make) -> None:
    found = compare([fake_run(), fake_run("runs/b")], [], samples=20)
    assert [own.metric for own in found] == ["recall@10", "ndcg@10"]
    assert all(own.difference == 0 and own.p == 1 for own in found)


def test_runs_stand_side_by_side(fake_run: Make, metrics: Make) -> None:
    runs = [fake_run("runs/a"), fake_run("runs/[b]", metrics=metrics("local") | {"spread": {}})]
    lines = [line.plain.split() for line in run_table(runs).lines()]
    assert lines[0] == ["run", "method", "recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr"]
    assert lines[2][:4] == ["runs/a", "pplr", "0.1100", "0.1200"]
    assert lines[3][:2] == ["runs/[b]", "local"]
    spreads = [line.plain.split() for line in spread_table(runs, ["ndcg@10"]).lines()]
    assert spreads[2] == ["runs/a", "ndcg@10", "0.0301", "0.0702", "0.0404", "0.0103"]
    assert spreads[3] == ["runs/[b]", "ndcg@10", "-", "-", "-", "-"]


def test_runs_that_cannot_be_compared_are_refused(fake_run: Make) -> None:
    with pytest.raises(RunError, match="not finished") as unfinished:
        run_table([fake_run(metrics=None)])
    assert "pplr train runs/a/config.yaml --run-dir runs/a --resume" in unfinished.value.cure
    with pytest.raises(RunError, match="another holdout"):
        compare([fake_run(), fake_run("runs/b", provenance={"holdout_sha256": "bb"})], [])
    with pytest.raises(ConfigError, match="Did you mean 'ndcg@10'"):
        spread_table([fake_run()], ["ndcg10"])
