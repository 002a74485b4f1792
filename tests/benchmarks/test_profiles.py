"""The profiles at tiny size, and the page that is written from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aggregation, measuring, performance_page, profiles
from benchmarks.origins import origins_of


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, small_config, model_folder: Path) -> None:
    for name, value in {"RANK": 2, "LAYERS": 1, "WIDTH": 6, "VALUES": 4}.items():
        monkeypatch.setattr(aggregation, name, value)
    base = f"backbone.model={model_folder}"
    monkeypatch.setattr(profiles, "AGGREGATED", 4)
    monkeypatch.setattr(profiles, "_demo", lambda *others: small_config(base, *others))
    item_vectors = ("backbone.name=item_vectors", "backbone.item_vectors.width=8", "training.samples=null")
    monkeypatch.setattr(profiles, "_items", lambda: small_config(base, *item_vectors))


@pytest.mark.parametrize("name", profiles.JOBS)
def test_every_job_is_measured_and_shown(tiny: None, name: str) -> None:
    told = profiles.measure(name, 2)
    json.dumps(told)
    assert all(count > 0 for count in told["counts"].values())
    assert sum(part["seconds"] for part in told["kinds"].values()) == pytest.approx(1)
    assert (told["crossed_bytes"] > 0) == (name not in ("aggregate", "compare_products"))
    assert name in performance_page.TITLES
    body = performance_page.job_body(name, {"before": {}, "after": {name: told | {"origin": ORIGIN}}})
    assert body.count("\n| ") == len(told["kinds"]) + 2
    assert "before" not in body


ORIGIN = {
    "command": "python -m benchmarks.profiles",
    "day": "2026-01-02",
    "commit": "abc",
    "machine": {"processor": "a processor", "threads": 2, "capability": "AVX512", "torch": "2.0"},
}
OLDER = ORIGIN | {"command": "python -m benchmarks.profiles --label before", "day": "2026-01-01", "commit": "012"}


def job(seconds: float, origin: dict[str, Any] = ORIGIN, **kinds: float) -> dict[str, Any]:
    return {
        "origin": origin,
        "counts": {"samples": 3},
        "seconds": measuring.spread([seconds]),
        "crossed_bytes": 0,
        "kinds": {kind: {"seconds": share, "bytes": 1e6} for kind, share in kinds.items()},
    }


def test_the_page_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    (docs / "performance_text").mkdir(parents=True)
    results.mkdir()
    (docs / "performance_text" / "index.md").write_text("What this is.\n")
    (docs / "performance_text" / "train.md").write_text("By hand.\n")
    performance_page.write_page(results, docs)
    assert (docs / "performance.md").read_text() == (
        "# Performance\n\nWhat this is.\n\n## Train: the next title, cut\n\nBy hand.\n"
    )
    roofline = {"machine": ORIGIN["machine"], "command": "python -m benchmarks.roofline", "notes": ["a note"]}
    (results / "roofline.json").write_text(json.dumps(roofline))
    performance_page.write_page(results, docs)
    page = (docs / "performance.md").read_text()
    assert page.index("- a note") < page.index("## Train")
    assert "Where the profiles are from" not in page
    assert "## Evaluate" not in page


def test_the_page_shows_both_columns_and_where_each_is_from(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    results.mkdir()
    shown = ("train", "evaluate", "recommend", "aggregate")
    content = {
        "before": {name: job(4.0, OLDER, attention=0.75, dropout=0.25) for name in shown},
        "after": {name: job(2.0, attention=0.5, other=0.5) for name in shown},
    }
    (results / "profiles.json").write_text(json.dumps(content))
    performance_page.write_page(results, docs)
    opening, *sections = (docs / "performance.md").read_text().split("\n## ")
    names = ", ".join(shown)
    assert (
        f"- before: {names}: `{OLDER['command']}`. Measured on 2026-01-01 on a processor, 2 threads, AVX512" in opening
    )
    assert (
        f"- after: {names}: `{ORIGIN['command']}`. Measured on 2026-01-02 on a processor, 2 threads, AVX512" in opening
    )
    assert opening.count("pplr at 012") == opening.count("pplr at abc") == 1
    assert [own.split("\n")[0] for own in sections] == [performance_page.TITLES[name] for name in shown]
    for own in sections:
        assert (
            "| kind of operation | time, before | time, after | memory asked for, before | memory asked for, after"
            in own
        )
        assert "| attention | 75.0% | 50.0% | 1.0 MB | 1.0 MB |\n| other | 0.0% | 50.0% | 0.0 MB | 1.0 MB |\n" in own
        assert "- before: 3 samples in 4 s (4 to 4 over 1 runs)\n- after: 3 samples in 2 s" in own
        assert "- 2.00 times as fast as before" in own


def test_columns_of_other_work_or_of_another_machine_do_not_compare() -> None:
    before, after = job(4.0, OLDER), job(2.0)
    assert performance_page.compared(before, after) == "2.00 times as fast as before"
    assert "do not do as much" in performance_page.compared(before | {"counts": {"samples": 2}}, after)
    other = OLDER | {"machine": OLDER["machine"] | {"capability": "AVX2"}}
    assert "different machines" in performance_page.compared(job(4.0, other), after)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (profiles, measuring):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(profiles, "write_page", lambda: None)
    monkeypatch.setattr(profiles, "use_all_cores", lambda: None)
    return tmp_path


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, day: str, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(profiles, "measure", lambda name, times: _without_origin(job(float(times), products=1.0)))
    monkeypatch.setattr(profiles, "origin", lambda name: ORIGIN | {"day": day})
    monkeypatch.setattr(sys, "argv", ["benchmarks.profiles", *arguments])
    profiles.main()
    return json.loads((folder / "profiles.json").read_text())


def _without_origin(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != "origin"}


def test_each_job_keeps_where_it_is_from_and_notes_tell_both_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, folder, "monday", "--jobs", "train", "evaluate", "--times", "4")
    measured(monkeypatch, folder, "tuesday", "--jobs", "train", "--times", "9", "--label", "before")
    told = measured(monkeypatch, folder, "wednesday", "--jobs", "evaluate", "--times", "2")
    days = {label: {name: own["origin"]["day"] for name, own in told[label].items()} for label in ("before", "after")}
    assert days == {"before": {"train": "tuesday"}, "after": {"train": "monday", "evaluate": "wednesday"}}
    assert [note.split(":")[0] for note in told["notes"]] == [
        "train, before (3 samples)",
        "train, after (3 samples)",
        "evaluate, after (3 samples)",
    ]
    assert [of for of, _ in origins_of(told)] == ["before: train", "after: train", "after: evaluate"]
