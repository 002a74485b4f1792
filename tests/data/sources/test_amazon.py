import gzip
import json
from pathlib import Path

import pytest

from pplr.config import DataConfig
from pplr.data.sources import load_dataset
from pplr.errors import DataError

OLD = ("reviewerID", "asin", "overall", "unixReviewTime")
NEW = ("user_id", "parent_asin", "rating", "timestamp")
EVENTS = [("u1", "B2", 5.0, 200), ("u1", "B1", 1.0, 100), ("u2", "B2", 3.0, 50)]


def _lines(keys: tuple[str, ...], scale: int = 1) -> str:
    rows = [(user, item, rating, time * scale) for user, item, rating, time in EVENTS]
    return "".join(json.dumps(dict(zip(keys, row, strict=True)) | {"text": "Misérables"}) + "\n" for row in rows)


def _check(path: Path, source: str) -> None:
    found = load_dataset(DataConfig(source=source, path=path))
    assert found.user_ids == ("u1", "u2")
    assert found.catalog.item_ids == ("B1", "B2")
    assert found.catalog.titles == ("Pokémon & Co", "B2")
    assert found.catalog.attributes == {"brand": ("Acme", ""), "category": ("Games|PC|A/B", "")}
    assert [items.tolist() for items in found.histories] == [[0, 1], [1]]
    times = found.interactions.timestamps
    assert times is not None
    assert (times[1] - times[0], times[0] - times[2]) == (100.0, 50.0)


META = {"title": "Pokémon &amp; Co", "brand": "Acme", "price": 3.0}


def test_2014_with_its_python_literals(tmp_path: Path) -> None:
    (tmp_path / "reviews_Video_Games_5.json.gz").write_bytes(gzip.compress(_lines(OLD).encode()))
    meta = {"asin": "B1", "categories": [["Games", "PC"], ["Games", "A|B"]]} | META
    (tmp_path / "meta_Video_Games.json.gz").write_bytes(gzip.compress(f"{meta!r}\n{{'asin': 'B2'}}\n".encode()))
    (tmp_path / "meta_Books.json.gz").write_bytes(b"not read")
    _check(tmp_path, "amazon-2014")
    _check(tmp_path / "reviews_Video_Games_5.json.gz", "amazon-2014")


def test_2018_with_pieces_of_script_for_titles(tmp_path: Path) -> None:
    (tmp_path / "Video_Games_5.json").write_text(_lines(OLD), encoding="utf-8")
    meta = [
        {"asin": "B1", "category": ["Games", "PC", "A|B"]} | META,
        {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();", "category": []},
        {"asin": "B9", "title": "never reviewed"},
    ]
    (tmp_path / "meta_Video_Games.json").write_text("\n".join(map(json.dumps, meta)))
    _check(tmp_path, "amazon-2018")


@pytest.mark.parametrize("table", [True, False])
def test_2023_in_lines_and_as_csv(tmp_path: Path, table: bool) -> None:
    scale = 1_000_000_000_000 // 50  # milliseconds
    if table:
        rows = [",".join(NEW), *(f"{u},{i},{r},{t * scale}" for u, i, r, t in EVENTS)]
        (tmp_path / "Video_Games.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    else:
        (tmp_path / "Video_Games.jsonl").write_text(_lines(NEW, scale), encoding="utf-8")
    meta = {"parent_asin": "B1", "store": "Acme", "categories": ["Games", "PC", "A|B"]} | META
    (tmp_path / "meta_Video_Games.jsonl").write_text(json.dumps(meta) + "\n" + json.dumps({"parent_asin": "B2"}))
    found = load_dataset(DataConfig(source="amazon-2023", path=tmp_path))
    assert found.catalog.titles == ("Pokémon & Co", "B2")
    assert found.catalog.attributes["category"] == ("Games|PC|A/B", "")
    assert found.interactions.timestamps is not None
    assert found.interactions.timestamps.tolist() == [2e9, 4e9, 1e9]


def test_without_meta_titles_are_ids_and_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "Games.json").write_text(_lines(OLD))
    found = load_dataset(DataConfig(source="amazon-2018", path=tmp_path))
    assert found.catalog.titles == ("B1", "B2")
    assert "no meta_* file beside Games.json" in found.notes[0]


def test_another_edition_is_told_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "Games.json").write_text(_lines(NEW))
    with pytest.raises(DataError, match=r"line 1 has no 'reviewerID', only: user_id, .*editions differ"):
        load_dataset(DataConfig(source="amazon-2018", path=tmp_path))


def test_a_rating_in_words_and_two_metas(tmp_path: Path) -> None:
    (tmp_path / "Games.json").write_text(_lines(OLD).replace("3.0", '"three"'))
    with pytest.raises(DataError, match="row 3: the rating 'three' is not a number"):
        load_dataset(DataConfig(source="amazon-2018", path=tmp_path))
    (tmp_path / "Games.json").write_text(_lines(OLD))
    for name in ("meta_A.json", "meta_B.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"several files of items lie beside Games\.json: meta_A\.json, meta_B\.json"):
        load_dataset(DataConfig(source="amazon-2018", path=tmp_path))
