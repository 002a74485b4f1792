from __future__ import annotations

import json

import pytest

from benchmarks.claim_tables import averaged, behind, claim_sections, method_row
from benchmarks.cold_start_tables import cold_start_sections
from benchmarks.recommendation_tables import best_in_validation, recommendation_sections
from benchmarks.records import read_record, write_record
from benchmarks.results import OPENING, ROOT, main, sections_of
from benchmarks.tables import Section, interval, known_interval, page
from pplr.errors import RunError
from pplr.testing import refuses

MACHINE = {"processor": "a processor", "threads": 2}


def test_an_interval_is_students() -> None:
    assert interval([0.1]) == "0.1000"
    assert interval([0.1, 0.2, 0.3]) == "0.2000 ± 0.2484"  # 4.3027 · 0.1 / √3
    assert known_interval([None, 0.5]) == "0.5000"
    assert known_interval([None]) == ""


def test_prose_stands_below_its_heading_and_is_never_lost(tmp_path) -> None:
    sections = [Section("one", "One", "table 1"), Section("two", "Two", "table 2", level=3)]
    (tmp_path / "index.md").write_text("To begin with.\n")
    (tmp_path / "two.md").write_text("In plain words.\n")
    expected = "# T\n\nopening\n\nTo begin with.\n\n## One\n\ntable 1\n\n### Two\n\nIn plain words.\n\ntable 2\n"
    assert page("T", "opening", sections, tmp_path) == expected
    (tmp_path / "three.md").write_text("Of a table that is gone.")
    with refuses(RunError, "three.md belongs to no section of T"):
        page("T", "opening", sections, tmp_path)


def quality(sha: str, *figures: float, config: str = "configs/movielens_item_vectors.yaml") -> dict:
    runs = [
        {
            "seed": seed,
            "rounds": 3 + seed,
            "holdout_sha256": sha,
            "overall": {"recall@10": own, "ndcg@10": own / 2, "recall@20": own * 2, "ndcg@20": own},
            "spread": {"ndcg@10": {"worst": None if seed else 0.01}},
            "floors": {"popularity": {"recall@10": 0.05, "ndcg@10": 0.02, "recall@20": 0.1, "ndcg@20": 0.03}},
            "seconds": {"total": 120.0},
        }
        for seed, own in enumerate(figures)
    ]
    return {"machine": MACHINE, "config": config, "set": ["federation.method=centralized"], "runs": runs}


def sasrec(sha: str) -> dict:
    overall = {"recall@10": 0.1, "ndcg@10": 0.05, "recall@20": 0.2, "ndcg@20": 0.08}
    return {
        "machine": MACHINE,
        "holdout_sha256": sha,
        "users": 9,
        "requirements": ["rectools"],
        "sasrec": {
            "chosen": {"n_factors": 64},
            "tried": [{"ndcg": 0.05}],
            "runs": [{"seconds": 60.0, "epochs": 5}, {"seconds": 120.0, "epochs": 10}],
        },
        "overall": {"sasrec, seed 0": overall, "sasrec, seed 1": overall, "popularity": overall},
    }


def test_what_was_measured_on_one_holdout_stands_in_one_table() -> None:
    told = {"b-ours": quality("a" * 64, 0.1, 0.2), "z-sasrec": sasrec("a" * 64)}
    told["games"] = quality("b" * 64, 0.3, config="configs/games_item_vectors.yaml")
    games, movies = recommendation_sections(told)
    assert movies.title == "Recommendations: movielens-100k, leave_one_out"
    lines = movies.body.splitlines()
    assert lines[0].startswith("| what | seeds | recall@10 | ndcg@10 |")
    assert lines[2] == (
        "| b-ours | 2 | 0.1500 ± 0.6353 | 0.0750 ± 0.3177 | 0.3000 ± 1.2706 | 0.1500 ± 0.6353 | 0.0100 | 3/4 | 2 |"
    )
    sasrec_row = "0.1000 ± 0.0000 | 0.0500 ± 0.0000 | 0.2000 ± 0.0000 | 0.0800 ± 0.0000 |  | 5/10 | 2 |"
    assert lines[3] == f"| sasrec | 2 | {sasrec_row}"
    assert lines[4] == "| popularity | 1 | 0.1000 | 0.0500 | 0.2000 | 0.0800 |  |  |  |"  # told once
    assert "pplr train configs/movielens_item_vectors.yaml --set federation.method=centralized" in movies.body
    assert "| popularity | 1 | 0.0500 |" in games.body  # from the run itself, where nothing else measured it


def test_when_validation_was_best_is_told_where_one_client_was_trained() -> None:
    told = quality("a", 0.1, 0.2)
    first, second = told["runs"]
    first["validation"] = {"metric": "ndcg@10", "clients": {"pooled": [0.1, None, 0.3, 0.3]}}
    second["validation"] = {"metric": "loss", "clients": {"pooled": [2.5, 1.25, 1.5]}}
    assert best_in_validation(told["runs"]) == " Best in validation: ndcg@10 0.3000 after 3, loss 1.2500 after 2."
    (section,) = recommendation_sections({"one": told})
    assert "ndcg@10 0.3000 after 3" in section.body
    second["validation"]["clients"]["other"] = [1.0]
    assert best_in_validation(told["runs"]) == ""
    assert best_in_validation(quality("a", 0.1)["runs"]) == ""


def test_cold_start_has_a_table_for_items_and_one_for_users() -> None:
    def run(seed: int, unseen: int, places: tuple[str, ...]) -> dict:
        models = {name: {p: {"recall@10": 0.1 * (seed + 1), "ndcg@10": 0.05} for p in places} for name in ("a", "b")}
        chosen = {"chosen": {"n_factors": 8, "dropout_rate": 0.2}} if seed else None
        return {"seed": seed, "unseen": unseen, "users": 40 + seed, "models": models, "sasrec": chosen}

    kinds = {
        "unseen_items": [run(seed, 7, ("catalog", "among")) for seed in (0, 1)],
        "new_users": [run(0, 0, ("catalog",))],
    }
    told = {"machine": MACHINE, "config": "c.yaml", "set": [], "cold_start": kinds}
    opening, items, users = cold_start_sections("cold", told)
    assert opening.body.startswith("`python -m benchmarks.cold_start c.yaml --name cold`; a processor, 2 threads.")
    lines = items.body.splitlines()
    assert lines[0] == (
        "| model | seeds | recall@10 | ndcg@10 | recall@10 among the unseen | ndcg@10 among the unseen |"
    )
    assert lines[2].startswith("| a | 2 | 0.1500 ± 0.6353 | 0.0500 ± 0.0000 | 0.1500")
    assert "- Test users, each with one target: 40/41." in lines
    assert "- Unseen items: 7/7." in items.body
    assert "8 factors and dropout 0.2" in items.body
    assert users.body.splitlines()[2] == "| a | 1 | 0.1000 | 0.0500 |"


@pytest.fixture
def folder(tmp_path, make_record):
    """A test of the claim by hand: two methods, one of them with a seed missing, and one not run."""
    kept = tmp_path / "results" / "claim"
    tested = {"0": [0, 1], "1": [2, 3]}
    runs = {
        ("pplr", 0): {0: (1.0, 0.5), 2: (1.0, 1.0)},
        ("pplr", 1): {0: (1.0, 0.5), 3: (1.0, 1.0)},
        ("local", 0): {0: (1.0, 0.25)},
    }
    for (method, seed), hits in runs.items():
        job = {"holdout": "leave_one_out", "partition": "kmeans", "seed": seed, "method": method}
        write_record(kept / f"leave_one_out-kmeans-{seed}-{method}.json", {"job": job, **make_record(tested, hits)})
    plan = {
        "config": "c.yaml",
        "set": ["a.b=1"],
        "seeds": [0, 1],
        "holdouts": ["leave_one_out", "global_time"],
        "partitions": ["kmeans"],
        "methods": ["local", "fedavg", "pplr"],
    }
    (kept / "plan.json").write_text(json.dumps(plan))
    return kept


def test_the_claims_tables_say_what_is_missing(folder) -> None:
    opening, found, missing = claim_sections(folder)
    assert "`python -m benchmarks.claim c.yaml --set a.b=1 --name claim`" in opening.body
    assert missing.body == "Not run yet."
    assert (found.slug, found.title) == ("claim-leave_one_out-kmeans", "leave_one_out, clients by kmeans")
    by_recall, by_ndcg, notes = found.body.split("\n\n")
    lines = by_recall.splitlines()
    assert lines[0] == "| recall@10 | seeds | overall | worst client | gap | std | behind | pplr less this | p |"
    assert lines[2].startswith("| local | 1 of 2 | 0.2500 | 0.0000 | 0.5000 | 0.2500 |  | +0.2500 [")
    assert lines[3] == "| fedavg | 0 of 2 |  |  |  |  |  |  |  |"
    assert lines[4].startswith("| pplr | 2 | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 | 0.0000 ± 0.0000 |")
    assert lines[4].endswith("| 0 of 2 |  |  |")
    assert lines[5] == "| popularity |  | 0.1000 |  |  |  |  |  |  |"
    assert by_ndcg.startswith("| ndcg@10 |")
    assert "Test users of the clients: 2/2." in notes
    assert "local 3.0 and 1.0, pplr 3.0 and 1.0" in notes


def test_seeds_of_two_machines_are_told_apart(folder) -> None:
    path = folder / "leave_one_out-kmeans-1-pplr.json"
    record = read_record(path)
    machine = {"processor": "a processor", "threads": 1}
    write_record(path, {**record, "machine": machine | {"device": "A GPU"}, "seconds": {"total": 30.0}})
    for other in ("0-pplr", "0-local"):
        there = folder / f"leave_one_out-kmeans-{other}.json"
        write_record(there, {**read_record(there), "machine": machine})
    notes = claim_sections(folder)[1].body.split("\n\n")[2].splitlines()
    assert notes[1:] == [
        "- Measured on A GPU beside a processor, 1 threads: seed 1. Rounds and minutes a seed: pplr 3.0 and 0.5.",
        "- Measured on a processor, 1 threads: seed 0. Rounds and minutes a seed: local 3.0 and 1.0, pplr 3.0 and 1.0.",
        "- Training loss in the last server round, mean over clients and seeds: local 1.00, pplr 1.00.",
    ]


def test_who_could_learn_from_whom_is_told_by_round(folder) -> None:
    for seed, (ends, weights) in enumerate([((0.5, 0.7), [[0.2, 1.0], [1.0, 1.0]]), ((0.4, 0.6), [[0.995, 0.98]])]):
        path = folder / f"leave_one_out-kmeans-{seed}-pplr.json"
        rounds = [{"loss": [4.0, 5.0 + seed], "similarity": list(ends), "heating": own} for own in weights]
        write_record(path, {**read_record(path), "rounds": rounds})
    notes = claim_sections(folder)[1].body.splitlines()
    assert "pplr 4.75." in notes[-3]  # of 4, 5, 4 and 6
    assert notes[-2:] == [
        "- Similarity of two clients by pplr: 0.4000 to 0.7000 in the first round, 0.4000 to 0.7000 in the last.",
        "- Clients of pplr whose heating weight is above .99, by round: 2 of 4, 2 of 2.",
    ]


def test_users_are_averaged_over_the_seeds_that_both_have(make_record) -> None:
    one = {
        0: make_record({"0": [0, 1]}, {0: (1.0, 0.4)}),
        1: make_record({"0": [0, 2]}, {0: (1.0, 0.8)}),
        2: make_record({"0": [0]}, {}),
    }
    other = {0: make_record({"0": [0, 1]}, {1: (1.0, 1.0)}), 1: make_record({"0": [0]}, {0: (1.0, 0.2)})}
    left, right = averaged(one, other, "ndcg@10")
    assert left.users.tolist() == right.users.tolist() == [0, 1]
    assert left.values["ndcg@10"].tolist() == pytest.approx([0.6, 0.0])
    assert right.values["ndcg@10"].tolist() == pytest.approx([0.1, 1.0])
    assert averaged(one, {5: other[0]}, "ndcg@10") is None
    assert method_row("fedavg", {"fedavg": {}, "pplr": one}, 3, "ndcg@10") == ["fedavg", "0 of 3", *[""] * 7]


def test_a_client_is_behind_where_it_would_do_better_alone(make_record) -> None:
    tested = {"0": [0], "1": [1], "2": [2]}
    alone = {0: make_record(tested, {0: (1.0, 0.5), 1: (1.0, 0.5)}), 2: make_record(tested, {})}
    others = {0: make_record(tested, {0: (1.0, 0.4), 1: (1.0, 0.5), 2: (1.0, 0.1)}), 1: make_record(tested, {})}
    assert behind(others, alone, "ndcg@10") == "1 of 3"
    assert behind(others, alone, "recall@10") == "0 of 3"
    assert behind(others, {}, "ndcg@10") == ""


def test_the_page_is_the_same_each_time(folder, tmp_path) -> None:
    results = tmp_path / "results"
    (results / "ours.json").write_text(json.dumps(quality("a" * 64, 0.1)))
    (tmp_path / "docs" / "results_text").mkdir(parents=True)
    (tmp_path / "docs" / "results_text" / "claim.md").write_text("It holds.")
    main(tmp_path)
    first = (tmp_path / "docs" / "results.md").read_text()
    assert first.index("## Recommendations") < first.index("It holds.") < first.index("### leave_one_out")
    main(tmp_path)
    assert (tmp_path / "docs" / "results.md").read_text() == first
    assert len(sections_of(results)) == 4
    (tmp_path / "docs" / "results_text" / "lost.md").write_text("?")
    with pytest.raises(SystemExit, match=r"error: results_text/lost\.md belongs to no section"):
        main(tmp_path)


def test_the_committed_page_is_what_the_command_writes() -> None:
    docs = ROOT / "docs"
    assert (docs / "results.md").read_text(encoding="utf-8") == page(
        "Results", OPENING, sections_of(ROOT / "results"), docs / "results_text"
    )
