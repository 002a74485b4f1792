from pathlib import Path

import pytest

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.sources import fetch_source, load_dataset, register_source, source_folder, sources
from pplr.errors import SourceError


def test_what_is_registered() -> None:
    assert set(sources()) == {
        "amazon-2014",
        "amazon-2018",
        "amazon-2023",
        "microlens",
        "movielens-100k",
        "movielens-latest-small",
        "recbole",
        "table",
    }
    assert all(source.name == name and source.summary and source.needs for name, source in sources().items())


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already registered as 'table'"):
        register_source("table", summary="", needs="")(lambda path, config: RawTables.__new__(RawTables))


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(SourceError, match="Did you mean 'movielens-100k'"):
        load_dataset(DataConfig(source="movielens100k"))


@pytest.mark.parametrize("name", sorted(sources()))
def test_a_path_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no file or folder .*nowhere"):
        load_dataset(DataConfig(source=name, path=tmp_path / "nowhere"))


@pytest.mark.parametrize("name", sorted(sources()))
def test_a_folder_without_the_files_says_what_it_holds(name: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds other\.txt, expected"):
        load_dataset(DataConfig(source=name, path=tmp_path))


def test_a_source_that_only_a_person_can_get() -> None:
    with pytest.raises(SourceError) as caught:
        fetch_source("amazon-2018")
    assert str(source_folder("amazon-2018")) in caught.value.cure
    source_folder("table").mkdir(parents=True)
    (source_folder("table") / "events.csv").write_text("user,item\na,x\n")
    assert load_dataset(DataConfig(source="table")).user_ids == ("a",)
