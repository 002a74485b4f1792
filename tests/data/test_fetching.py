import io
import json
import urllib.error
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest

from pplr.data import fetching
from pplr.data.fetching import fetch_archive, fetch_first, fetch_wheel
from pplr.errors import SourceError
from pplr.storage import cache_dir, sha256_bytes, sha256_file

WHEEL = "tiny_data-1.0-py3-none-any.whl"
MEMBERS = ("tiny_data/deep/a.txt", "tiny_data/b.bin")
URL = "https://example.org/files/tiny.zip"


def _make_wheel(folder: Path, text: str = "alpha") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_data/deep/a.txt", text)
        wheel.writestr("tiny_data/b.bin", b"\x00\x01")
        wheel.writestr("tiny_data/__init__.py", "raise SystemExit('never run')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


def _fetch(into: Path, sha256: str, told: list[str] | None = None) -> Path:
    return fetch_wheel("tiny-data", "1.0", WHEEL, sha256, MEMBERS, into, None if told is None else told.append)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own package index: a folder, and no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_fetched_once_from_the_users_own_index(index: Path, tmp_path: Path) -> None:
    sha256 = sha256_file(_make_wheel(index))
    told: list[str] = []
    into = tmp_path / "cache" / "tiny"
    assert _fetch(into, sha256, told) == into
    assert (into / "a.txt").read_text() == "alpha"
    assert (into / "b.bin").read_bytes() == b"\x00\x01"
    manifest = json.loads((into / "manifest.json").read_text())
    assert manifest["files"]["a.txt"] == sha256_bytes(b"alpha")
    assert len(told) == 1
    assert "\n" not in told[0]
    assert WHEEL in told[0]
    assert sha256[:12] in told[0]
    (index / WHEEL).unlink()  # offline from here on
    assert _fetch(into, sha256, told) == into
    assert len(told) == 1
    assert [path.name for path in into.parent.iterdir()] == ["tiny"]


def test_offline_and_uncached_names_the_file_and_its_place(index: Path, tmp_path: Path) -> None:
    place = cache_dir() / "wheels" / WHEEL
    into = tmp_path / "cache" / "tiny"
    with pytest.raises(SourceError) as caught:
        _fetch(into, "0" * 64)
    assert str(place) in caught.value.cure
    assert "pip download --no-deps tiny-data==1.0" in caught.value.cure
    assert "\n" not in str(caught.value)
    sha256 = sha256_file(_make_wheel(place.parent))
    assert (_fetch(into, sha256) / "a.txt").read_text() == "alpha"


def test_an_altered_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    _make_wheel(index)
    with pytest.raises(SourceError, match=rf"{WHEEL} was altered or truncated: SHA-256 .* expected 0000"):
        _fetch(tmp_path / "tiny", "0" * 64)
    assert not (tmp_path / "tiny").exists()
    dropped = _make_wheel(cache_dir() / "wheels")
    with pytest.raises(SourceError) as caught:
        _fetch(tmp_path / "tiny", "0" * 64)
    assert str(dropped) in caught.value.cure
    assert dropped.exists()


@pytest.mark.parametrize("damage", ["truncate", "alter", "delete", "manifest", "no manifest"])
def test_a_damaged_cache_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    sha256 = sha256_file(_make_wheel(cache_dir() / "wheels"))
    into = _fetch(tmp_path / "tiny", sha256)
    file, manifest = into / "a.txt", into / "manifest.json"
    named = file
    if damage == "truncate":
        file.write_text("alph")
    elif damage == "alter":
        file.write_text("alphb")
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
        named = manifest
    else:
        manifest.unlink()
        named = into
    before = {path: path.read_bytes() for path in into.iterdir()}
    with pytest.raises(SourceError) as caught:
        _fetch(into, sha256)
    assert str(named) in caught.value.message
    assert f"Delete the folder {into}" in caught.value.cure
    assert {path: path.read_bytes() for path in into.iterdir()} == before
    for path in into.iterdir():
        path.unlink()
    into.rmdir()
    assert (_fetch(into, sha256) / "a.txt").read_text() == "alpha"


def test_another_pinned_wheel_is_no_hit(tmp_path: Path) -> None:
    into = _fetch(tmp_path / "tiny", sha256_file(_make_wheel(cache_dir() / "wheels")))
    with pytest.raises(SourceError, match="this version expects 1111"):
        _fetch(into, "1" * 64)


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    sha256 = sha256_file(_make_wheel(cache_dir() / "wheels"))
    with pytest.raises(SourceError, match=r"no item named 'tiny_data/c\.txt'"):
        fetch_wheel("tiny-data", "1.0", WHEEL, sha256, ["tiny_data/c.txt"], tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def _zip(text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/a.txt"), text)
    return content.getvalue()


class _Response(io.BytesIO):
    """What urllib answers."""

    def __init__(self, content: bytes, length: int) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(length)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """Choose what every address answers; `None` is no network."""
    served: list[bytes | None] = [None]

    def answer(request: object, timeout: float) -> _Response:
        if served[0] is None:
            raise urllib.error.URLError("no network")
        cut = served[0].removesuffix(b"CUT")
        return _Response(cut, len(served[0]))

    monkeypatch.setattr("urllib.request.urlopen", answer)
    return lambda content: served.__setitem__(0, content)


def test_an_archive_without_a_known_hash_is_recorded(serve: Callable[[bytes | None], None], tmp_path: Path) -> None:
    told: list[str] = []
    into = tmp_path / "tiny"
    serve(_zip("first"))
    fetch_archive(URL, None, ["tiny/a.txt"], into, told.append)
    assert (into / "a.txt").read_text() == "first"
    assert len(told) == 1
    serve(None)
    fetch_archive(URL, None, ["tiny/a.txt"], into, told.append)  # cached
    for path in into.iterdir():
        path.unlink()
    serve(_zip("second"))
    record = cache_dir() / "archives" / "tiny.zip.sha256"
    with pytest.raises(SourceError, match="new edition") as caught:
        fetch_archive(URL, None, ["tiny/a.txt"], into, told.append)
    assert str(record) in caught.value.cure
    record.unlink()
    fetch_archive(URL, None, ["tiny/a.txt"], into)
    assert (into / "a.txt").read_text() == "second"


def test_archives_that_do_not_come_whole(serve: Callable[[bytes | None], None], tmp_path: Path) -> None:
    members, into, place = ["tiny/a.txt"], tmp_path / "tiny", cache_dir() / "archives" / "tiny.zip"
    with pytest.raises(SourceError, match="no network") as caught:
        fetch_archive(URL, None, members, into)
    assert f"Put tiny.zip at {place}" in caught.value.cure
    serve(_zip("x") + b"CUT")
    with pytest.raises(SourceError, match=r"ended after \d+ of \d+ bytes"):
        fetch_archive(URL, None, members, into)
    serve(b"<html>not found</html>")
    with pytest.raises(SourceError, match="does not unpack"):
        fetch_archive(URL, None, members, into)
    with pytest.raises(SourceError, match="altered or truncated"):
        fetch_archive(URL, "0" * 64, members, into)
    with pytest.raises(SourceError, match="is not https"):
        fetch_archive(URL.replace("https", "http"), None, members, into)
    assert not into.exists()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(_zip("by hand"))
    assert (fetch_archive(URL, None, members, into) / "a.txt").read_text() == "by hand"


def test_without_pip_a_wheel_is_not_fetched_but_taken_where_it_was_put(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="ensurepip"):
        _fetch(tmp_path / "into", "0" * 64)
    sha256 = sha256_file(_make_wheel(cache_dir() / "wheels"))
    assert (_fetch(tmp_path / "into", sha256) / "a.txt").read_text() == "alpha"


def test_the_first_way_that_is_cached_or_reached(serve: Callable[[bytes | None], None], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ways = [
        (one, lambda: fetch_archive(URL, None, ["tiny/a.txt"], one)),
        (two, lambda: fetch_archive(URL.replace("tiny", "other"), None, ["tiny/a.txt"], two)),
    ]
    with pytest.raises(SourceError) as caught:
        fetch_first("tiny", ways)
    assert "tiny.zip at" in caught.value.cure
    assert "other.zip at" in caught.value.cure
    serve(_zip("x"))
    ways[1][1]()
    serve(None)
    assert fetch_first("tiny", ways) == two
    (two / "a.txt").write_text("y")
    with pytest.raises(SourceError, match="altered"):
        fetch_first("tiny", ways)
