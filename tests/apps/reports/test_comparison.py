"""Runs beside each other on one page: figures, clients, and which differences can be called one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pplr.apps.cli import app
from pplr.apps.reports.pages import write_comparison, write_report
from pplr.errors import RunError
from pplr.recommend.evaluation import Evaluation, paired_bootstrap

from .conftest import read_page

Change = Callable[..., None]
LEAKED = "What the strongest attack on the server's side read in each run, and what differential privacy bounds"
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def better(folder: Path, tmp_path: Path, change: Change) -> Path:
    """The same run, in which client 0's users each fare better by a half, and client 1's worse or better by a tenth."""
    other = tmp_path / "better <b>"
    shutil.copytree(folder, other)

    def alter(told: dict[str, Any]) -> None:
        own = told["test"]
        for column in own["values"].values():
            for place, client in enumerate(own["client_of"]):
                column[place] += {"0": 0.5, "1": 0.1 if place % 2 else -0.1}.get(client, 0.0)

    change(other / "evaluation.json", alter)
    return other


def test_differences_are_the_paired_bootstrap_over_users(folder: Path, better: Path, tmp_path: Path) -> None:
    out = write_comparison([folder, better], ["ndcg@3"], tmp_path / "c.html", samples=500, seed=3)
    page = read_page(out.read_text())
    first, other = (
        Evaluation.from_dict(json.loads((one / "evaluation.json").read_text())["test"]) for one in (folder, better)
    )
    mean, low, high, p = paired_bootstrap(other, first, "ndcg@3", samples=500, seed=3)
    row = page.tables["Each run less run, over the users that both tested"]["better <b>"]
    assert (row["difference"][1], row["p"][1], row["users"][1]) == (mean, p, len(first.users))
    assert row["95 % interval"][0] == f"{low:+.4f} to {high:+.4f}"
    assert row["more than chance"][0] == ("yes" if low > 0 or high < 0 else "no")
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_each_client_s_users_are_compared_alone(folder: Path, better: Path, tmp_path: Path) -> None:
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=500).read_text())
    rows = page.tables["Each client's users: better <b> less run"]
    assert rows["client 0"]["difference"][1] == pytest.approx(0.5)
    assert rows["client 0"]["more than chance"][0] == "yes"
    assert rows["client 2"]["difference"][1] == 0
    assert [rows[name]["more than chance"][0] for name in ("client 1", "client 2")] == ["no", "no"]


def test_runs_with_other_partitions_are_not_paired_by_client(
    folder: Path, better: Path, tmp_path: Path, change: Change
) -> None:
    change(better / "provenance.json", lambda told: told.update(partition_sha256="ab"))
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=50).read_text())
    assert "shared users out among clients differently" in page.text
    assert not [name for name in page.tables if name.startswith("Each client's users")]


def test_a_report_puts_other_runs_beside_its_own(folder: Path, better: Path) -> None:
    page = read_page(write_report(folder, [better], samples=50).read_text())
    assert page.tables["Test figures, means over all users"]["better <b>"]["method"][0] == "pplr"
    assert "Each run less run, over the users that both tested" in page.tables


def test_runs_that_cannot_be_compared_are_refused(folder: Path, better: Path, tmp_path: Path, change: Change) -> None:
    out = tmp_path / "c.html"
    change(better / "provenance.json", lambda told: told.update(holdout_sha256="ab"))
    with pytest.raises(RunError, match="another holdout"):
        write_comparison([folder, better], [], out)
    (better / "metrics.json").unlink()
    with pytest.raises(RunError, match="has no metrics yet"):
        write_comparison([folder, better], [], out)
    assert not out.exists()


def test_the_command_writes_the_page_beside_its_tables(folder: Path, better: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.html"
    arguments = ["compare", str(folder), str(better), "--samples", "20", "--html", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"written: {out}")
    assert "<h1>Comparison: run, better &lt;b&gt;</h1>" in out.read_text()


def test_what_the_server_read_stands_beside_the_cost(
    folder: Path, better: Path, tmp_path: Path, audit: dict[str, Any]
) -> None:
    (folder / "audit.json").write_text(json.dumps(audit))
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=20).read_text())
    table = page.tables["What the runs cost, and what the server read of histories at best"]
    assert table["run"]["server read, item_f1"] == ("0.81 (0.69 to 0.88)", 0.8125)
    assert table["better <b>"]["server read, item_f1"] == ("not measured", None)


def test_runs_learn_mix_and_leak_side_by_side(
    folder: Path, better: Path, tmp_path: Path, change: Change, audit: dict[str, Any]
) -> None:
    lines = [json.loads(line) for line in (better / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["clients"]["0"]["loss"] = 9.25
        line["clients"]["0"]["mixed_from"]["0"] = 0.125
    more = [lines[0] | {"server_round": number} for number in range(1, 8)]
    (better / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    (folder / "audit.json").write_text(json.dumps(audit))
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=20).read_text())
    told = [own["alt"] for own in page.images]
    first = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]

    def mean_loss(record: dict[str, Any]) -> float:
        losses = [own["loss"] for own in record["clients"].values()]
        return sum(losses) / len(losses)

    ends = [f"run run from {mean_loss(first[0]):.4f} to {mean_loss(first[-1]):.4f}"]
    ends.append(f"run better <b> from {mean_loss(more[0]):.4f} to {mean_loss(more[-1]):.4f}")
    assert f"Lines of mean training loss by server round: {', '.join(ends)}." in told
    for name, records in (("run", first), ("better <b>", more)):
        start, end = (record["clients"]["0"]["loss"] for record in (records[0], records[-1]))
        curve = f"Lines of training loss by server round of {name}: client 0 from {start:.4f} to {end:.4f}"
        assert any(alt.startswith(curve) for alt in told)
        assert any(alt.startswith(f"Lines of heating weight by server round of {name}: ") for alt in told)
        rounds = [record["server_round"] for record in records]
        drawn = rounds if len(rounds) <= 3 else [1, 4, 7]
        for what in ("Mixing weights of", "Similarity of the clients' adapters in"):
            start = f"{what} server round "
            found = [alt for alt in told if alt.startswith(start) and f" of {name}" in alt]
            assert [int(alt.removeprefix(start).split()[0]) for alt in found] == drawn
    kept = page.tables["How much of its own adapter each client keeps in the last mixture, 0 to 1"]["0"]
    assert kept["run, round 2"][1] == first[-1]["clients"]["0"]["mixed_from"]["0"]
    assert kept["better <b>, round 7"][1] == 0.125
    assert "Of each run the first, the middle and the last server round are drawn" in page.text
    table = page.tables[LEAKED]
    assert table["run"]["item_f1"] == ("0.81 (0.69 to 0.88)", 0.8125)
    assert table["run"]["a guess, item_f1"][1] == 0.25
    assert table["run"]["largest ε of a client"] == ("no bound", None)
    assert table["better <b>"]["audited at"][0] == "not audited"
    assert table["better <b>"]["item_f1"] == ("not measured", None)
    anchors = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert [f"#{part}" in anchors for part in ("learning", "mixing", "leakage")] == [True] * 3


def test_an_audit_at_another_cut_is_told_as_one(
    folder: Path, better: Path, tmp_path: Path, audit: dict[str, Any]
) -> None:
    audit["settings"].pop()
    (folder / "audit.json").write_text(json.dumps(audit))
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=20).read_text())
    assert "run was audited at k = 1, m = 1 of 3 blocks, noise 2 times the states' size, which is not" in page.text
    assert page.tables[LEAKED]["run"]["item_f1"][1] == 0.4375


def test_runs_that_recorded_no_rounds_say_so(folder: Path, better: Path, tmp_path: Path) -> None:
    for one in (folder, better):
        (one / "rounds.jsonl").unlink()
    page = read_page(write_comparison([folder, better], [], tmp_path / "c.html", samples=20).read_text())
    assert "No run recorded a loss or a validation figure" in page.text
    assert "No run mixed adapters." in page.text
