from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import cold_start as module
from benchmarks.cold_start import RANDOM, Among, expected, main
from benchmarks.sasrec import Scored, histories_of
from pplr.config import HoldoutConfig
from pplr.config_files import load_config
from pplr.data.holdout import Holdout, make_holdout
from pplr.data.prompts import Case
from pplr.data.sources import load_dataset
from pplr.recommend.evaluation import evaluate
from pplr.runtimes.in_process import train


def test_ranking_among_some_items_leaves_out_all_others() -> None:
    table = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    case = Case(0, (0,), (4,), (0, 2))
    whole = evaluate(Scored(table, [0]), {"a": [case]}, [1, 2], 4)
    among = evaluate(Among(Scored(table, [0]), (2, 3, 4)), {"a": [case]}, [1, 2], 4)
    assert whole.overall()["recall@2"] == 0.0  # behind 1 and 3
    assert (among.overall()["recall@1"], among.overall()["recall@2"]) == (0.0, 1.0)  # behind 3 alone, as 2 is masked
    nothing = Scored(np.zeros((1, 5), dtype=np.float32), [0])
    assert (
        evaluate(Among(nothing, (2, 3, 4)), {"a": [case]}, [1], 4).overall()["recall@1"] == 0.0
    )  # a tie gains nothing


def test_a_random_order_is_the_mean_over_all_places() -> None:
    sizes, cutoffs = [4, 15], [10]
    table = [[place < 10 for place in range(n)] for n in sizes]
    found = expected(sizes, cutoffs)
    assert found["recall@10"] == pytest.approx(np.mean([np.mean(row) for row in table]))
    gains = [[1 / np.log2(place + 2) if place < 10 else 0.0 for place in range(n)] for n in sizes]
    assert found["ndcg@10"] == pytest.approx(np.mean([np.mean(row) for row in gains]))
    assert expected([], [10])["recall@10"] is None


def test_sasrec_is_told_the_history_without_what_is_masked_besides() -> None:
    rows = [np.array(own, dtype=np.int32) for own in ([3, 1, 3], [2], [5])]
    holdout = Holdout((rows[0],), (rows[1],), (rows[2],), "x", unseen=(4, 5), masked=(np.array([4], dtype=np.int32),))
    assert histories_of(holdout, [Case(0, (1, 3, 2), (5,), (3, 1, 2, 4))]) == {0: [3, 1, 2]}


def test_cold_start_on_tiny_data(tiny_config, tmp_path, monkeypatch) -> None:
    def finish(config, overrides, folder) -> None:
        trained.append(folder.name)
        train(load_config(config, overrides), folder).close()

    trained: list[str] = []
    monkeypatch.setattr(module, "finish", finish)
    wanted = ["--seeds", "1", "--methods", "pplr", "--without-sasrec", "--share", "0.3", "--user-share", "0.4"]
    floors = ["--set", "evaluation.floors=[popularity, item_knn]"]
    main([str(tiny_config), "--name", "cold", *wanted, *floors], root=tmp_path)
    assert trained == ["cold-unseen_items-1-pplr", "cold-new_users-1-pplr"]
    told = json.loads((tmp_path / "results" / "cold.json").read_text())["cold_start"]
    (items,), (users,) = told["unseen_items"], told["new_users"]
    models = {"item_vectors, pplr", "popularity", "item_knn", RANDOM}
    assert set(items["models"]) == set(users["models"]) == models
    run = json.loads((tmp_path / "runs" / trained[0] / "metrics.json").read_text())
    assert items["models"]["item_vectors, pplr"]["catalog"] == run["overall"]
    for floor in ("popularity", "item_knn"):  # neither knows an unseen item
        assert items["models"][floor]["catalog"]["recall@10"] == 0.0
    assert items["models"][RANDOM]["among"]["recall@10"] == 1.0  # six items are unseen
    assert set(users["models"]["popularity"]) == {"catalog"}
    config = load_config(tiny_config)
    holdout = make_holdout(load_dataset(config.data), HoldoutConfig(kind="new_users", share=0.4), 1)
    assert users["users"] + users["left_out"] == len(holdout.test)
    assert users["holdout_sha256"] == holdout.sha256
