from pathlib import Path

import pytest

from pplr.config import DataConfig
from pplr.data.sources import load_dataset
from pplr.errors import DataError


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("MicroLens-50k_titles.csv", 'item,title\n10,"Cats, dogs &amp; ""birds"""\n2,Plain\n'),
        ("MicroLens-100k_title_en.csv", '10, Cats, dogs & "birds"\n2,Plain\n'),
    ],
)
def test_pairs_and_titles(tmp_path: Path, name: str, titles: str) -> None:
    (tmp_path / "MicroLens-50k_pairs.csv").write_text(
        "user,item,timestamp\n5,10,1583378629552\n5,2,1583378629551\n6,10,1583378629550\n"
    )
    (tmp_path / name).write_text(titles)
    found = load_dataset(DataConfig(source="microlens", path=tmp_path))
    assert found.user_ids == ("5", "6")
    assert found.catalog.item_ids == ("2", "10")
    assert found.catalog.titles[0] == "Plain"
    assert found.catalog.titles[1].replace(", ", ",") == 'Cats,dogs & "birds"'
    assert [items.tolist() for items in found.histories] == [[0, 1], [1]]
    assert found.interactions.timestamps is not None
    assert found.interactions.timestamps[0] == 1583378629.551


def test_other_names_and_no_titles(tmp_path: Path) -> None:
    (tmp_path / "x_pairs.csv").write_text("userID,videoID,timestamp\n5,10,1\n")
    found = load_dataset(DataConfig(source="microlens", path=tmp_path))
    assert found.catalog.titles == ("10",)
    assert "no file of titles" in found.notes[0]


def test_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "x_pairs.csv").write_text("user,item\n5,10\n")
    with pytest.raises(DataError, match="no column 'timestamp' or 'time' for the timestamp, only: user, item"):
        load_dataset(DataConfig(source="microlens", path=tmp_path))
    (tmp_path / "x_pairs.csv").write_text("user,item,timestamp\n5,10,1\n")
    (tmp_path / "x_titles.csv").write_text("item\n10\n")
    with pytest.raises(DataError, match="no line of an item and its title"):
        load_dataset(DataConfig(source="microlens", path=tmp_path))
    (tmp_path / "x_title_en.csv").write_text("10,x\n")
    with pytest.raises(DataError, match="several files of titles"):
        load_dataset(DataConfig(source="microlens", path=tmp_path))
