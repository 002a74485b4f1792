"""How a run stands, by its folder."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from pplr.apps.web.standing import Standing, Watcher
from pplr.config import Config
from pplr.errors import RunError
from pplr.runtimes.claiming import is_claimed
from pplr.runtimes.run_folder import claimed


def record(number: int, loss: float = 2.0) -> dict[str, Any]:
    own = {
        "samples": 12, "loss": loss, "loss_share": 0.5, "heating_weight": 0.75, "seconds": 3.0, "bytes_up": 0,
        "bytes_down": 0, "mixed_from": {"0": 0.5, "1": 0.5}, "validation": {"ndcg@10": 0.1},
    }  # fmt: skip
    return {"server_round": number, "similarity": [[1.0, 0.7], [0.7, 1.0]], "clients": {"0": own, "1": own}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    return tmp_path


def html(standing: Standing) -> str:
    return "".join(block.html for block in standing.blocks)


def write(folder: Path, *records: dict[str, Any]) -> None:
    (folder / "rounds.jsonl").write_text("".join(json.dumps(own) + "\n" for own in records))


def test_it_follows_a_training(folder: Path) -> None:
    watcher = Watcher(folder)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = watcher.look()
        assert first.state == "running"
        assert "No server round is finished yet" in html(first)
        assert watcher.look() is first
        write(folder, record(1))
        second = watcher.look()
        assert "1 of at most" in second.sentence
        assert html(second).count("<img") == 5  # loss, validation, heating weights, mixture, similarity
        write(folder, record(1), record(2, 1.5))
        third = watcher.look()
        assert third.changed != second.changed
        assert "similarity of the clients&#39; adapters in server round 2" in html(third).lower()
        assert "server round 1:" not in html(third)
    assert watcher.look().state == "stopped"
    assert "--resume" in html(watcher.look())
    assert not watcher.is_finished


def test_pieces_are_the_same_from_round_to_round_and_only_some_say_something_else(folder: Path) -> None:
    watcher = Watcher(folder)
    write(folder, record(1))
    first = {block.key for block in watcher.look().blocks}
    write(folder, record(1), record(2))
    before = watcher.look().blocks
    write(folder, record(1), record(2), record(3, 1.5))
    after = watcher.look().blocks
    keys = [block.key for block in after]
    assert [block.key for block in before] == keys
    assert first < set(keys)  # from the second on a note says of which round the squares are
    assert len(set(keys)) == len(keys)
    same = [new.key for old, new in zip(before, after, strict=True) if old.html == new.html]
    assert {"learning", "mixing", "mixing-paragraph-1"} <= set(same)
    tables = [block for block in after if "-table-" in block.key]
    assert tables
    for block in tables:
        assert f'id="{block.named_by}"' in block.html
        assert "tabindex" not in block.html  # what scrolls is around it, and stays


def test_a_tested_run_is_finished(folder: Path, metrics: Any) -> None:
    write(folder, record(1))
    (folder / "metrics.json").write_text(json.dumps(metrics()))
    found = Watcher(folder).look()
    assert found.state == "finished"
    assert "0.1200" in html(found)  # the headline metric
    assert "--resume" not in html(found)


def test_a_clients_own_folder_can_be_asked_without_test_figures_and_the_operators_cannot(folder: Path, metrics) -> None:
    watcher = Watcher(folder)
    (folder / "client.json").write_text('{"client": "0", "hosted": true}')
    assert not watcher.is_finished
    (folder / "clients" / "0").mkdir(parents=True)
    assert watcher.is_finished
    assert watcher.has_adapters
    assert "tested" not in watcher.look().sentence
    (folder / "clients" / "0").rmdir()
    (folder / "clients").rmdir()
    (folder / "client.json").unlink()
    (folder / "metrics.json").write_text(json.dumps(metrics()))
    assert watcher.is_finished
    assert not watcher.has_adapters


def test_a_file_that_is_half_written_is_told_until_it_is_whole(folder: Path) -> None:
    watcher = Watcher(folder)
    (folder / "rounds.jsonl").write_text(json.dumps(record(1))[:40])
    assert "damaged" in html(watcher.look())
    write(folder, record(1))
    assert "damaged" not in html(watcher.look())


def test_names_with_markup_are_text(folder: Path) -> None:
    bad = json.loads(json.dumps(record(1)).replace('"0"', '"<img src=x>"'))
    write(folder, bad)
    told = html(Watcher(folder).look())
    assert "<img src=x>" not in told
    assert "&lt;img src=x&gt;" in told


def test_looking_neither_takes_a_folder_nor_keeps_it_from_a_run(folder: Path, tmp_path: Path) -> None:
    assert not is_claimed(tmp_path / "nothing")
    new = tmp_path / "new"
    with claimed(new, Config(), resume=False):
        assert is_claimed(new)
        with pytest.raises(RunError, match="another process"), claimed(new, Config(), resume=False):
            pass
    assert not is_claimed(new)
    with claimed(new, Config(), resume=False):
        pass
