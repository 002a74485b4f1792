"""The summary and its page: every required row is there, measured or not, and every result says where it is from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measuring, summary
from benchmarks.origins import ages, machines, place
from benchmarks.required import BENCHMARKS, REQUIRED, Required

MACHINE = {"processor": "p", "threads": 2, "capability": "AVX512", "torch": "t", "transformers": "f", "peft": "l"}
KEYS = ["name", "against", "ratio", "at_least", "at_most", "met"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "PAGE", tmp_path / "benchmarks.md")
    return tmp_path


def put(results: Path, name: str, *rows: dict[str, Any], **content: Any) -> None:
    (results / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "rows": rows, **content}))


def written(results: Path) -> tuple[list[dict[str, Any]], str]:
    summary.write_summary()
    return json.loads((results / "summary.json").read_text()), (results / "benchmarks.md").read_text()


def test_required_rows_are_those_that_speed_is_held_to() -> None:
    assert [(own.benchmark, own.at_least) for own in REQUIRED] == [
        ("federated_round", 3.0),
        ("packed", 10.0),
        ("equal_time", 3.0),
        ("sasrec_speed", None),
        ("evaluating", 10.0),
        ("overlap", 0.95),
        ("overlap", 1.3),
        ("aggregation", 50.0),
        ("roofline", 0.6),
        ("gpu", 16 / 3),
    ]


@pytest.mark.parametrize("own", REQUIRED, ids=lambda own: f"{own.benchmark}, {own.at_least}")
def test_a_required_row_is_measured_by_a_benchmark_and_found_by_its_words(own: Required) -> None:
    assert own.benchmark in BENCHMARKS or own.benchmark == "gpu"
    spec = importlib.util.find_spec(f"benchmarks.{own.benchmark}")
    assert spec is not None
    measured = measuring.complete(own.row | {"name": f"{own.words}, as measured", "ratio": 1.0, "met": True})
    assert own.matches(measured)
    assert not own.matches(measured | {"name": "something else"})
    assert not own.matches(measured | {"at_least": 0.1})
    assert not own.matches(measured | {"name": f"{own.words} (extrapolated)"})
    path = measuring.RESULTS / f"{own.benchmark}.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert any(own.matches(row) for row in rows)
        assert {row["at_least"] for row in rows if own.words in row["name"]} <= {own.at_least, None}  # or told beside


def test_what_is_required_and_not_measured_is_there_without_a_ratio(results: Path) -> None:
    rows, page = written(results)
    assert rows == [own.row for own in sorted(REQUIRED, key=lambda own: own.benchmark)]
    assert all(row["ratio"] is row["met"] is None for row in rows)
    assert (
        "| training across the cut with overlap, TLS loopback | the uncut model | not measured | at least 0.95 |  |"
        in (page)
    )
    assert "Not measured: `aggregation`, `attention`, " in page
    assert all(f"\n## {name}\n\n`python -m benchmarks.{name}`\n" in page for name in BENCHMARKS)


def test_only_what_was_measured_with_the_bound_that_is_required_counts(results: Path) -> None:
    name = "training across the cut with overlap, TLS loopback"
    put(results, "overlap", measuring.at_least(name, "the uncut model", 0.97, 0.95))
    rows, page = written(results)
    own = [row for row in rows if row["at_least"] in (0.95, 1.3)]
    assert [(row["ratio"], row["met"]) for row in own] == [(0.97, True), (None, None)]
    assert "rows of `overlap`" in page
    put(results, "overlap", measuring.at_least(name, "the uncut model", 0.97, 0.9))
    rows, _ = written(results)
    assert [row["ratio"] for row in rows if row["at_least"] == 0.95] == [None]


def test_every_entry_has_both_bounds_and_null_for_what_it_has_not(results: Path) -> None:
    put(
        results,
        "wire",
        {"name": "a", "against": "b", "ratio": 0.25, "at_least": None, "met": None},
        {"name": "c", "against": "d", "ratio": 2.0, "at_least": 1.5, "met": True},
        {"name": "e", "against": "f", "ratio": 2.0, "at_most": 1.5, "met": False},
    )
    rows, page = written(results)
    assert all(list(row) == KEYS for row in rows)
    assert [(row["at_least"], row["at_most"]) for row in rows[-3:]] == [(None, None), (1.5, None), (None, 1.5)]
    assert "| a | b | 0.25 |  |  |\n| c | d | 2.00 | at least 1.5 | yes |\n| e | f | 2.00 | at most 1.5 | no |" in page


def test_a_row_that_has_no_ratio_tells_its_reason_on_the_page(results: Path) -> None:
    name = "validation NDCG@10 after equal wall-clock time, item vectors"
    row = {"name": name, "against": "b", "ratio": None, "at_least": 3.0, "met": None, "reason": "b has none"}
    measuring.write_result("equal_time", {"rows": [row]})
    rows, page = written(results)
    assert {"name": name, "against": "b", "ratio": None, "at_least": 3.0, "at_most": None, "met": None} in rows
    assert [own["name"] for own in rows].count(name) == 1
    assert f"| {name} | b | b has none | at least 3.0 |  |" in page


def test_the_committed_summary_has_every_required_row_and_every_key() -> None:
    rows = json.loads((measuring.RESULTS / "summary.json").read_text(encoding="utf-8"))
    assert all(list(row) == KEYS for row in rows)
    for own in REQUIRED:
        assert own.row in rows or any(own.matches(row) for row in rows), own.name


def test_each_result_says_where_it_is_from_and_the_page_which_are_older_or_of_another_machine(results: Path) -> None:
    put(results, "wire", day="2026-01-02", commit="abc")
    put(results, "clients", day="2026-01-02")
    put(results, "training", day="2025-12-31", machine=MACHINE | {"capability": "AVX2"})
    put(results, "packed")
    _, page = written(results)
    assert "Measured on 2026-01-02 on p, 2 threads, AVX512, torch t, transformers f, peft l; pplr at abc." in page
    assert "Measured on 2025-12-31 on p, 2 threads, AVX2, torch t" in page
    assert "older are `training` on 2025-12-31; `packed` on a day that was not kept." in page
    assert "Most were measured on p, 2 threads, AVX512; otherwise `training` on p, 2 threads, AVX2." in page


def test_results_of_one_day_and_machine_are_said_to_be() -> None:
    named = [(name, {"day": "2026-01-02", "machine": MACHINE}) for name in ("a", "b")]
    assert ages(named) == "All were measured on 2026-01-02."
    assert machines(named) == "All were measured on p, 2 threads, AVX512."
    assert place({"machine": MACHINE | {"threads": 1}, "device": "G"}) == "G beside p, 1 thread, AVX512"


def test_a_result_keeps_its_day_and_the_commit_of_the_pplr_that_was_imported(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(measuring, "commit_of", lambda folder: asked.append(folder) or "abc")
    measuring.write_result("wire", {"rows": [{"name": "a", "against": "b", "ratio": 1.0, "at_most": 2, "met": True}]})
    told = json.loads((results / "wire.json").read_text())
    assert told["day"] == measuring.date.today().isoformat()
    assert told["commit"] == "abc"
    assert asked == [Path(measuring.pplr.__file__).parent]
    assert list(told["rows"][0]) == KEYS
