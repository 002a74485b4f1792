"""Files that are whole or absent, whatever the disk does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from pplr.errors import StorageError
from pplr.storage import cache_dir, sha256_bytes, sha256_file, storage_errors, write_atomic, write_json
from pplr.testing import refuses


def test_what_is_written_is_there(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "file.bin"
    write_atomic(path, b"first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EIO, "cannot write"),
        (errno.EROFS, "cannot write"),
    ],
)
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with refuses(StorageError, words):
            write_atomic(path, b"new and longer")
        with refuses(StorageError, str(tmp_path / "other")):
            write_atomic(tmp_path / "other", b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    write_atomic(path, b"new and longer")  # with space freed, the same call works
    assert path.read_bytes() == b"new and longer"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_the_content_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replace(a, b))[1])
    write_atomic(tmp_path / "file.bin", b"content")
    assert happened == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_place_that_is_no_folder_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with refuses(StorageError, "cannot write"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_only_what_the_disk_refuses_is_translated(tmp_path: Path):
    with pytest.raises(ValueError, match="mine"), storage_errors(tmp_path):
        raise ValueError("mine")
    with refuses(StorageError, str(tmp_path)), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_json_is_written_for_people(tmp_path: Path):
    write_json(tmp_path / "x.json", {"größe": [1, None, 0.1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"größe": [1, None, 0.1]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_it_does_not_know(tmp_path: Path, value: float):
    write_json(tmp_path / "x.json", {"metric": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"metric": {"deep": [value]}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"metric": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_hashes_are_sha256(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_bytes(content) == sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_it_is_asked_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PPLR_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "pplr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "pplr"
    assert not cache_dir().exists()


def test_the_mode_is_as_asked_and_nobody_else_reads_before(tmp_path, monkeypatch):
    seen = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(stat.S_IMODE(os.fstat(fd).st_mode)), real(fd))[1])
    write_atomic(tmp_path / "key", b"secret", mode=0o600)
    assert seen[0] == 0o600
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    write_atomic(tmp_path / "open", b"told")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o644
