from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pplr.apps.results import result_table
from pplr.runtimes.comparing import metric_names

Metrics = Callable[..., dict[str, Any]]


def shown(metrics: dict[str, Any], width: int | None = None) -> list[str]:
    return [line.plain for line in result_table(metrics, width)]


def row(lines: list[str], name: str) -> list[str]:
    (found,) = [line for line in lines if line.startswith(name)]
    return found.removeprefix(name).split()


def test_every_party_gets_its_row(metrics: Metrics) -> None:
    lines = shown(metrics())
    assert lines[0] == "pplr, causal_lm, 2 + 1 of 30 blocks on the client"
    assert row(lines, "client 0") == ["190", *["0.2500"] * 5]
    assert row(lines, "client 1") == ["191", *["0.2600"] * 5]
    assert row(lines, "overall") == ["381", "0.1100", "0.1200", "0.1300", "0.1400", "0.1500"]
    assert row(lines, "popularity") == ["0.0505", "0.0206", "-", "-", "-"]
    assert row(lines, "ndcg@10") == ["0.0301", "0.0702", "0.0404", "0.0103"]
    assert row(lines, "client  ") == ["412.3", "MB", "-", "3.4T"]
    assert row(lines, "server  ") == ["1.2", "GB", "-", "-"]
    assert "wire: 12.3 MB up, - down" in lines
    assert lines[-1] == "time: total 1 h 01 min, train 50 min 00 s, evaluate -; 2.3 samples/s"


def test_before_and_after_stand_side_by_side(metrics: Metrics) -> None:
    content = metrics()
    content["before"] = {"overall": {"recall@10": 0.001}, "clients": {"0": {"ndcg@10": 0.002}}}
    lines = shown(content)
    assert row(lines, "overall")[1:4] == ["0.0010", "->", "0.1100"]
    assert row(lines, "client 0")[4:7] == ["0.0020", "->", "0.2500"]
    assert row(lines, "popularity")[0] == "0.0505"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_loses_nothing(metrics: Metrics, width: int) -> None:
    content = metrics()
    content["before"] = {"overall": content["overall"], "clients": content["clients"]}
    lines = shown(content, width)
    assert max(len(line) for line in lines if not line.startswith("time: ")) <= width
    wide = " ".join(shown(content)).split()
    narrow = " ".join(lines).split()
    assert all(narrow.count(word) >= wide.count(word) for word in set(wide) if word[0].isdigit())


def test_what_was_not_measured_is_a_dash(metrics: Metrics) -> None:
    content = metrics()
    content["overall"] = dict.fromkeys(content["overall"])
    content["clients"]["0"]["users"] = None
    assert row(shown(content), "overall") == ["-"] * 6
    empty = {"method": "local", "overall": {}, "clients": {}, "cut": None}
    lines = shown(empty)
    assert lines[0] == "local, -, uncut"
    assert "0" not in "".join(lines)


def test_nothing_is_taken_for_markup(metrics: Metrics) -> None:
    content = metrics() | {"method": "[red]mine[/red]", "floors": {"[bold]x[/bold]": {}}}
    lines = result_table(content)
    assert lines[0].plain.startswith("[red]mine[/red], ")
    assert any(line.plain.startswith("[bold]x[/bold]") for line in lines)


def test_metric_names_keep_their_order_and_leave_users_out(metrics: Metrics) -> None:
    assert metric_names(metrics()) == ["recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr"]
    assert metric_names({"clients": {"0": {"users": 1, "mrr": 0.5}}}) == ["mrr"]
