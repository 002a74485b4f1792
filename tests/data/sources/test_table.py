from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from pplr.config import DataConfig, PartitionConfig
from pplr.data.sources import load_dataset
from pplr.errors import DataError, SourceError

COLUMNS = {"user": "customer", "item": "sku", "timestamp": "bought", "rating": "stars", "title": "name"}


def _frame() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "customer": [7, 7, 8, 8],
            "sku": [20.0, 3.0, 3.0, 20.0],
            "bought": [datetime(2020, 1, 2), datetime(2020, 1, 1), datetime(2020, 1, 3), datetime(2020, 1, 4)],
            "stars": [5, 4, None, 1],
            "name": ["Lamp", "Chair", "Chair", "Lamp"],
            "shop": ["north", "south", "south", "south"],
            "kind": ["light", "seat", "seat", "light"],
        }
    )


@pytest.mark.parametrize("end", ["csv", "tsv", "parquet", "semicolon.csv"])
def test_any_file_by_its_columns(tmp_path: Path, end: str) -> None:
    frame = _frame()
    path = tmp_path / f"orders.{end}"
    if end == "parquet":
        frame.write_parquet(path)
    else:
        text = frame.with_columns(pl.col("sku").cast(pl.Int64))
        text.write_csv(path, separator={"csv": ",", "tsv": "\t"}.get(end, ";"))
    columns = COLUMNS | {"shop": "shop", "genre": "kind"}
    found = load_dataset(DataConfig(source="table", path=tmp_path, columns=columns))
    assert found.user_ids == ("7", "8")
    assert found.catalog.item_ids == ("3", "20")
    assert found.catalog.titles == ("Chair", "Lamp")
    assert [items.tolist() for items in found.histories] == [[0, 1], [0, 1]]
    assert found.interactions.timestamps is not None
    assert found.interactions.timestamps.tolist() == [1577836800.0, 1577923200.0, 1578009600.0, 1578096000.0]
    assert found.user_attributes == {"shop": ("north", "south")}  # each user's most frequent, of equals the first
    assert found.catalog.attributes == {"genre": ("seat", "light")}  # one value for each item


def test_the_partitions_column_comes_along(tmp_path: Path) -> None:
    _frame().write_parquet(tmp_path / "x.parquet")
    partition = PartitionConfig(by="column", column="shop")
    found = load_dataset(DataConfig(source="table", path=tmp_path, columns=COLUMNS, partition=partition))
    assert found.user_attributes == {"shop": ("north", "south")}


def test_a_second_file_of_items(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user,sku\na,1\na,2\n")
    (tmp_path / "items.csv").write_text("sku,label,maker\n2,Two,X\n1,One,Y\n")
    columns = {"item": "sku", "title": "label", "brand": "maker"}
    config = DataConfig(
        source="table", path=tmp_path / "events.csv", items_path=tmp_path / "items.csv", columns=columns
    )
    found = load_dataset(config)
    assert found.catalog.titles == ("One", "Two")
    assert found.catalog.attributes == {"brand": ("Y", "X")}
    with pytest.raises(SourceError, match=r"there is no file .*none\.csv.*data\.items_path"):
        load_dataset(config.model_copy(update={"items_path": tmp_path / "none.csv"}))


@pytest.mark.parametrize("times", [["5", "3"], ["5000000000000", "3000000000000"], ["2020-01-02", "2020-01-01"]])
def test_ways_to_write_a_time(tmp_path: Path, times: list[str]) -> None:
    (tmp_path / "x.csv").write_text(f"user,item,timestamp\na,late,{times[0]}\na,early,{times[1]}\n")
    found = load_dataset(DataConfig(source="table", path=tmp_path))
    assert [found.catalog.item_ids[item] for item in found.histories[0]] == ["early", "late"]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("uid,item\na,x\n", {}, "no column 'user' for the user, only: uid, item"),
        ("user,item\na,x\n", {"timestamp": "when"}, "no column 'when' for the timestamp, only: user, item"),
        ("user,item\na,x\n", {"shop": "store"}, "no column 'store' for the shop"),
        ("user,item,rating\na,x,4\na,y,good\n", {}, "row 2: the rating 'good' is not a number"),
        (
            "user,item,timestamp\na,x,2020-01-01\na,y,soon\n",
            {},
            "row 2: the timestamp 'soon' is neither a number nor a date",
        ),
        ("user,item\n", {}, "holds no interactions"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, text: str, columns: dict[str, str], message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(source="table", path=tmp_path, columns=columns))


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="is not a Parquet file"):
        load_dataset(DataConfig(source="table", path=tmp_path))
