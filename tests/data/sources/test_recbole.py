from pathlib import Path

import pytest

from pplr.config import DataConfig
from pplr.data.sources import load_dataset
from pplr.errors import DataError, SourceError


def _write(folder: Path, name: str = "games") -> Path:
    (folder / f"{name}.inter").write_text(
        "user_id:token\titem_id:token\tposition:float\na\tB2\t1\na\tB1\t0\nb\tB1\t0\n"
    )
    (folder / f"{name}.item").write_text(
        'item_id:token\ttitle:token_seq\ttags:token_seq\nB1\tThe "Best\tfun  hard \nB2\t\t\n'
    )
    return folder


def test_folder_prefix_and_file(tmp_path: Path) -> None:
    _write(tmp_path)
    for path in (tmp_path, tmp_path / "games", tmp_path / "games.inter"):
        found = load_dataset(DataConfig(source="recbole", path=path))
        assert found.catalog.titles == ('The "Best', "B2")
        assert found.catalog.attributes == {"tags": ("fun|hard", "")}
        assert [items.tolist() for items in found.histories] == [[0, 1], [0]]
        assert found.interactions.timestamps is None
    _write(tmp_path, "other")
    with pytest.raises(SourceError, match=r"several files that fit: games\.inter, other\.inter"):
        load_dataset(DataConfig(source="recbole", path=tmp_path))
    assert load_dataset(DataConfig(source="recbole", path=tmp_path / "other")).user_ids == ("a", "b")


def test_times_go_before_positions_and_users_have_columns(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\tposition:float\ttimestamp:float\trating:float\na\tp\t0\t9\t1\na\tq\t1\t8\t2\n"
    )
    (tmp_path / "x.user").write_text("user_id:token\tregion:token\na\tnorth\n")
    found = load_dataset(DataConfig(source="recbole", path=tmp_path))
    assert [found.catalog.item_ids[item] for item in found.histories[0]] == ["q", "p"]
    assert found.user_attributes == {"region": ("north",)}
    assert found.interactions.ratings is not None


def test_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("session:token\ttrack:token\na\tp\n")
    (tmp_path / "x.item").write_text("track:token\tcaption:token_seq\np\tSong\n")
    columns = {"user": "session", "item": "track", "title": "caption"}
    found = load_dataset(DataConfig(source="recbole", path=tmp_path, columns=columns))
    assert found.catalog.titles == ("Song",)
    with pytest.raises(DataError, match="no column 'user_id' for the user, only: session, track"):
        load_dataset(DataConfig(source="recbole", path=tmp_path))


def test_a_header_that_is_not_atomic(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id,item_id\na,p\n")
    with pytest.raises(DataError, match="expected tab-separated name:type"):
        load_dataset(DataConfig(source="recbole", path=tmp_path))


def test_a_row_cut_short_has_no_time(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\na\tp\t1\na\tq\n")
    with pytest.raises(DataError, match="row 2: the timestamp is missing"):
        load_dataset(DataConfig(source="recbole", path=tmp_path))
