"""The profiles at tiny size, and the page that is written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aggregation, measuring, performance_page, profiles


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
    body = performance_page.job_body(name, {"before": {}, "after": {name: told}})
    assert body.count("\n| ") == len(told["kinds"]) + 2
    assert "before" not in body


def job(seconds: float, **kinds: float) -> dict[str, Any]:
    return {
        "counts": {"samples": 3},
        "seconds": measuring.spread([seconds]),
        "crossed_bytes": 0,
        "kinds": {kind: {"seconds": share, "bytes": 1e6} for kind, share in kinds.items()},
    }


def test_the_page_has_before_beside_after_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    (docs / "performance_text").mkdir(parents=True)
    results.mkdir()
    (docs / "performance_text" / "index.md").write_text("What this is.\n")
    (docs / "performance_text" / "train.md").write_text("By hand.\n")
    performance_page.write_page(results, docs)
    assert (docs / "performance.md").read_text() == (
        "# Performance\n\nWhat this is.\n\n## Train: the next title, cut\n\nBy hand.\n"
    )
    content = {
        "machine": {"processor": "a processor", "threads": 2},
        "before": {"train": job(4.0, attention=0.75, dropout=0.25)},
        "after": {"train": job(2.0, attention=0.5, other=0.5)},
    }
    (results / "profiles.json").write_text(json.dumps(content))
    roofline = {"machine": content["machine"], "command": "python -m benchmarks.roofline", "notes": ["a note"]}
    (results / "roofline.json").write_text(json.dumps(roofline))
    performance_page.write_page(results, docs)
    page = (docs / "performance.md").read_text()
    assert "| attention | 75.0% | 50.0% | 1.0 MB | 1.0 MB |\n| other | 0.0% | 50.0% | 0.0 MB | 1.0 MB |\n" in page
    assert "- before: 3 samples in 4 s (4 to 4 over 1 runs)\n- after: 3 samples in 2 s" in page
    assert page.index("- a note") < page.index("## Train")
    assert "Profiled on a processor, 2 threads." in page
    assert "## Evaluate" not in page


def test_what_was_measured_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "RESULTS", tmp_path)
    first = profiles.kept("before", {"train": 1})
    assert first == {"before": {"train": 1}, "after": {}}
    (tmp_path / "profiles.json").write_text(json.dumps(first))
    assert profiles.kept("after", {"evaluate": 2}) == {"before": {"train": 1}, "after": {"evaluate": 2}}
