"""Checkpoints that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pplr.errors import CheckpointError, StorageError
from pplr.federation.checkpoints import FORMAT, CheckpointStore


@pytest.fixture
def told():
    return []


@pytest.fixture
def store(tmp_path, told):
    return CheckpointStore(tmp_path / "checkpoints", keep=2, warn=told.append)


def write(store, server_round, improved=("a", "b")):
    """Write a checkpoint whose tensors are its round's number."""
    clients = {name: {"x": torch.full((3,), float(server_round)), "steps": torch.tensor(7)} for name in ("a", "b")}
    best = {name: {"x": torch.full((3,), float(server_round))} for name in improved}
    store.write(server_round, {"next_round": server_round + 1}, clients, best)


def values(checkpoint):
    return {name: checkpoint.tensors(name)["x"].tolist()[0] for name in ("client-a", "client-b", "best-a", "best-b")}


def again(store, told):
    """Open the same folder as another process would."""
    return CheckpointStore(store.folder, keep=store._keep, warn=told.append)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_nothing_written_is_nothing_found(store, told):
    assert store.newest() is None
    assert told == []


def test_the_newest_are_kept_and_read_back(store, told):
    for server_round in range(4):
        write(store, server_round)
    assert names(store) == ["000003", "000004"]
    found = again(store, told).newest()
    assert found.state == {"next_round": 4}
    assert values(found) == dict.fromkeys(("client-a", "client-b", "best-a", "best-b"), 3.0)
    assert found.tensors("client-a")["steps"].dtype == torch.int64
    assert told == []


def test_a_best_adapter_stays_until_a_better_one(store, told):
    write(store, 0)
    write(store, 1, improved=["b"])
    write(store, 2, improved=[])
    assert values(store.newest()) == {"client-a": 2.0, "client-b": 2.0, "best-a": 0.0, "best-b": 1.0}
    later = again(store, told)
    later.newest()
    write(later, 3, improved=["a"])
    assert values(later.newest()) == {"client-a": 3.0, "client-b": 3.0, "best-a": 3.0, "best-b": 1.0}


def damage_flip(folder):
    flip(folder / "client-b.safetensors")


def damage_truncate(folder):
    path = folder / "best-a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_remove(folder):
    (folder / "state.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


DAMAGES = [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_no_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_aloud_and_the_one_before_is_used(store, told, damage):
    write(store, 0)
    write(store, 1)
    damage(store.folder / "000002")
    found = again(store, told).newest()
    assert found.folder.name == "000001"
    (line,) = told
    assert "000002" in line
    assert "The one before it is used." in line


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_taken_over_from_a_damaged_checkpoint(store, told, damage):
    write(store, 0)
    write(store, 1)
    damage(store.folder / "000002")
    flip(store.folder / "000002" / "best-a.safetensors")
    later = again(store, told)
    assert later.newest().folder.name == "000001"
    write(later, 1, improved=["b"])
    assert values(later.newest()) == {"client-a": 1.0, "client-b": 1.0, "best-a": 0.0, "best-b": 1.0}


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(store, told):
    for server_round in range(3):
        write(store, server_round)
    write(store, 3)
    shutil.copytree(store.folder / "000003", store.folder / "000002")
    damage_flip(store.folder / "000003")
    damage_flip(store.folder / "000004")
    later = CheckpointStore(store.folder, keep=1, warn=told.append)
    assert later.newest().folder.name == "000002"
    write(later, 2)
    assert names(later) == ["000003"]
    assert values(later.newest())["client-a"] == 2.0


def test_all_damaged_is_an_error(store, told):
    write(store, 0)
    write(store, 1)
    damage_flip(store.folder / "000001")
    damage_remove(store.folder / "000002")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole"):
        again(store, told).newest()
    assert len(told) == 2


def test_a_newer_format_is_refused_and_never_overwritten(store, told):
    write(store, 0)
    write(store, 1)
    path = store.folder / "000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=rf"000002 has format {FORMAT + 1}, newer than {FORMAT}.*Update pplr"):
        again(store, told).newest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_full_disk_leaves_the_checkpoint_before_as_it_is(store, told, monkeypatch, call, number):
    write(store, 0)
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    real, calls = getattr(os, call), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"no space left while writing .*Free some space"):
        write(store, 1)
    monkeypatch.undo()
    assert len(calls) >= number
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before  # no remains
    assert values(again(store, told).newest())["client-a"] == 0.0
    write(store, 1)
    assert values(again(store, told).newest())["client-a"] == 1.0


def test_remains_of_a_writer_that_was_killed_are_no_checkpoint(store, told):
    write(store, 0)
    remains = store.folder / ".000002.tmp"
    remains.mkdir()
    (remains / "client-a.safetensors").write_bytes(b"half")
    later = again(store, told)
    assert later.newest().folder.name == "000001"
    write(later, 1)
    assert names(later) == ["000001", "000002"]
    assert load_file(later.folder / "000002" / "client-a.safetensors")["x"].tolist() == [1.0] * 3
