"""Tenancies on the stage server's disk: whole or absent, the newest two, for their owner alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from pplr.errors import CheckpointError, StorageError
from pplr.federation import checkpoints
from pplr.runtimes.stage_state import Owner, StateStore
from pplr.testing import refuses

ONE = Owner("one", "main")
SETTINGS = {"base_sha256": "0" * 64, "plan": [1, 1, 4]}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), value), "steps": torch.tensor(int(value))}


def saved(store: StateStore, owner: Owner = ONE) -> float:
    found = store.load(owner)
    assert found is not None
    assert found.settings == SETTINGS
    assert found.tensors["steps"].dtype == torch.int64
    return float(found.tensors["x"][1, 2])


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warned: list[str]) -> StateStore:
    return StateStore(tmp_path / "deep" / "state", warned.append)


def versions(store: StateStore, owner: Owner = ONE) -> list[Path]:
    return sorted(path for path in store._place(owner).iterdir() if path.name.isdigit())


def test_what_is_saved_is_read_back_to_the_bit(store) -> None:
    assert store.load(ONE) is None
    given = {"x": torch.randn(2, 3), "y": torch.randn(3, 2).T, "half": torch.randn(3).bfloat16()}
    store.save(ONE, SETTINGS, given)
    found = store.load(ONE)
    assert found is not None
    assert found.settings == SETTINGS
    assert found.tensors.keys() == given.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in given.items())
    assert found.tensors["half"].dtype == torch.bfloat16


def test_the_newest_two_are_kept(store) -> None:
    for value in range(1, 6):
        store.save(ONE, SETTINGS, tensors(value))
        assert saved(store) == value
    assert len(versions(store)) == 2


def test_a_new_store_of_the_same_folder_goes_on(store) -> None:
    store.save(ONE, SETTINGS, tensors(1))
    again = StateStore(store.folder)
    assert saved(again) == 1
    again.save(ONE, SETTINGS, tensors(2))
    assert saved(store) == 2


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["client-tenancy.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut_short, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_of_a_damaged_one_the_one_before_is_read_aloud(store, warned, damage, file) -> None:
    store.save(ONE, SETTINGS, tensors(1))
    store.save(ONE, SETTINGS, tensors(2))
    damage(versions(store)[-1] / file)
    assert saved(store) == 1
    assert len(warned) == 1
    store.save(ONE, SETTINGS, tensors(3))  # and saving again needs no repair
    assert saved(store) == 3


def test_only_damaged_ones_are_an_error(store) -> None:
    for value in (1, 2):
        store.save(ONE, SETTINGS, tensors(value))
    for folder in versions(store):
        flip(folder / "client-tenancy.safetensors")
    with refuses(CheckpointError, "none of the 2"):
        store.load(ONE)


def test_a_newer_format_is_refused(store) -> None:
    store.save(ONE, SETTINGS, tensors(1))
    store.save(ONE, SETTINGS, tensors(2))
    manifest = versions(store)[-1] / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"format": checkpoints.FORMAT + 1}))
    with refuses(CheckpointError, "newer"):
        store.load(ONE)


@pytest.mark.parametrize("when", ["write_atomic", "write_json", "sha256_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_killed_half_way_the_old_one_is_there(store, monkeypatch, when, error) -> None:
    """Whether the disk is full or the process ends, wherever it is."""
    store.save(ONE, SETTINGS, tensors(1))

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, when, fails)
        with pytest.raises((StorageError, OSError, KeyboardInterrupt)):
            store.save(ONE, SETTINGS, tensors(2))
    assert saved(store) == 1
    store.save(ONE, SETTINGS, tensors(3))
    assert saved(store) == 3


def test_what_a_killed_process_left_is_passed_over(store) -> None:
    store.save(ONE, SETTINGS, tensors(1))
    (store._place(ONE) / ".000002.tmp").mkdir()
    (store._place(ONE) / "notes 7").write_text("")
    assert saved(store) == 1
    store.save(ONE, SETTINGS, tensors(2))
    assert saved(store) == 2


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with refuses(StorageError, "file"):
        StateStore(tmp_path / "file" / "state")


@pytest.mark.parametrize("tenant", ["main", "../../x", "..", "a/b", "a b", "50%", "%2F", "ü", ".", "t-", "c-one"])
def test_every_tenant_has_a_folder_of_its_own_below_its_client(store, tenant) -> None:
    owner = Owner("one", tenant)
    store.save(owner, SETTINGS, tensors(4))
    store.save(Owner("two", tenant), SETTINGS, tensors(5))
    assert saved(store, owner) == 4
    assert store.owners() == [owner, Owner("two", tenant)]
    for path in store.folder.rglob("*"):
        assert path.resolve().is_relative_to(store.folder.resolve())
    assert store._place(owner).parent == store.folder / "c-one"


def test_tenants_that_look_alike_do_not_meet(store) -> None:
    alike = [Owner("one", name) for name in ("a/b", "a%2Fb", "a%252Fb", "a", "A", "a ")]
    for value, owner in enumerate(alike):
        store.save(owner, SETTINGS, tensors(value))
    assert [saved(store, owner) for owner in alike] == [*range(len(alike))]
    assert store.owners() == sorted(alike)


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_only_its_user_can_enter_the_folder(tmp_path, mode) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    StateStore(folder).save(ONE, SETTINGS, tensors(1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_new_folder_is_closed_whatever_the_umask(tmp_path) -> None:
    before = os.umask(0)
    try:
        StateStore(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
