"""The report of a run: its figures are those of the files, it needs nothing else, and nothing in it is markup."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pplr.apps.cli import app
from pplr.apps.reports.costs import WORKED_OUT
from pplr.apps.reports.pages import write_report
from pplr.apps.reports.records import read_run
from pplr.config import Config
from pplr.errors import RunError
from pplr.runtimes.run import Run

from .conftest import Found, read_page

MARKUP = "$y$ <script>alert('x')</script> & \"q\""
SWEPT = "The strongest attack at each setting, and what recommendations are worth"
Change = Callable[..., None]


def report(folder: Path, *others: Path) -> Found:
    return read_page(write_report(folder, others, samples=200).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(finished: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """A run that nobody changes, and its report."""
    folder, out = finished("evaluation.before=true").folder, tmp_path_factory.mktemp("report") / "report.html"
    return folder, read_page(write_report(folder, out=out, samples=200).read_text(encoding="utf-8"))


def values(row: dict[str, tuple[str, float | None]]) -> dict[str, float | None]:
    return {name: value for name, (_, value) in row.items() if value is not None}


def svgs(page: Found) -> list[str]:
    return [base64.b64decode(own["src"].partition("base64,")[2]).decode() for own in page.images]


def asks_elsewhere(svg: str) -> list[str]:
    """Find what a picture would load from another place than itself."""
    return re.findall(r'(?:href|src)="(?!#|data:)[^"]*"|url\((?!["\']?#)[^)]*\)', svg)


# -- figures ------------------------------------------------------------------------------------------------------


def test_test_figures_are_those_of_the_metrics(whole: tuple[Path, Found]) -> None:
    folder, page = whole
    told = json.loads((folder / "metrics.json").read_text())
    table = page.tables["Test figures, means over users, on the full catalog"]
    for client, own in told["clients"].items():
        assert values(table[f"client {client}"]) == own
    users = sum(own["users"] for own in told["clients"].values())
    assert values(table["all users"]) == told["overall"] | {"users": users}
    assert values(table["before training"]) == told["before"]["overall"] | {"users": users}
    assert values(table["floor: popularity"]) == told["floors"]["popularity"] | {"users": users}
    spread = page.tables["How far clients differ"]
    for metric, own in told["spread"].items():
        shown = values(spread[metric])
        assert (shown["worst client"], shown["best client"], shown["gap"], shown["std"]) == tuple(
            own[key] for key in ("worst", "best", "gap", "std")
        )
    assert table["all users"]["mrr"][0] == f"{told['overall']['mrr']:.4f}"


def test_cost_is_that_of_the_metrics_and_the_whole_is_both_sides(whole: tuple[Path, Found]) -> None:
    folder, page = whole
    told = json.loads((folder / "metrics.json").read_text())
    table = page.tables["Each side, beside holding the whole model"]
    stored = [told["cost"][party]["stored_bytes"] for party in ("client", "server")]
    heading = "stored, frozen tensors"
    assert [table[name][heading][1] for name in ("client", "server")] == stored
    assert table["the whole model in one place"][heading][1] == sum(stored)
    assert table["client"]["of the whole"][1] == stored[0] / sum(stored)
    rows = {"client": "client", "server": "server", "whole": "the whole model in one place"}
    flops = {side: told["cost"][side]["train_flops"] for side in rows}
    assert {side: table[name][WORKED_OUT][1] for side, name in rows.items()} == flops
    assert table["client"]["of the whole's FLOPs"][1] == flops["client"] / flops["whole"]
    assert flops["client"] + flops["server"] == flops["whole"]
    assert "Training compute is worked out from the samples that were trained on, and not measured" in page.text
    wire = page.tables["Wire and time, of all clients and rounds"]
    assert wire["client to server, training"]["figure"][1] == told["cost"]["wire"]["bytes_up"]
    assert wire["time: train"]["figure"][1] == told["seconds"]["train"]


def test_floors_stand_beside_each_client_on_the_client_s_own_users(whole: tuple[Path, Found]) -> None:
    folder, page = whole
    run = read_run(folder).run
    (caption,) = [name for name in page.tables if "beside the floors" in name]
    metric = caption.partition(" ")[0]
    for client, own in run.evaluation("popularity").by_client().items():
        assert page.tables[caption][f"client {client}"]["floor: popularity"][1] == own[metric]
    found = page.tables["This run less each floor, over the same users"]["popularity"]
    pair = [run.evaluation(part).overall()[metric] or 0.0 for part in ("test", "popularity")]
    assert found["difference"][1] == pytest.approx(pair[0] - pair[1])


def test_rounds_are_those_of_the_records(whole: tuple[Path, Found]) -> None:
    folder, page = whole
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    last = records[-1]
    table = page.tables[f"Server round {last['server_round']}, the last; all are in rounds.jsonl"]
    for client, own in last["clients"].items():
        shown = values(table[client])
        assert [shown[name] for name in ("samples", "loss", "loss share", "heating weight")] == [
            own[name] for name in ("samples", "loss", "loss_share", "heating_weight")
        ]
    kept = page.tables["How much of its own adapter each client keeps in the mixture, 0 to 1"]
    for record in records:
        for client, own in record["clients"].items():
            assert kept[client][f"round {record['server_round']}"][1] == own["mixed_from"][client]


@pytest.mark.usefixtures("undrawn")
def test_squares_are_drawn_of_every_round_or_it_is_said_of_which(folder: Path) -> None:
    first = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])

    def squares(rounds: int) -> tuple[Found, list[str]]:
        records = [json.dumps(first | {"server_round": number}) for number in range(1, rounds + 1)]
        (folder / "rounds.jsonl").write_text("\n".join(records) + "\n")
        page = report(folder)
        start = re.compile(r"Similarity of the clients' adapters in server round (\d+):")
        return page, [found[1] for own in page.images if (found := start.match(own["alt"]))]

    page, drawn = squares(12)
    assert drawn == [str(number) for number in range(1, 13)]
    assert "The squares show" not in page.text
    page, drawn = squares(23)
    assert drawn == [str(number) for number in range(1, 24, 2)]
    assert f"The squares show server rounds {', '.join(drawn)}, of 23 that mixed" in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_the_audit_found_is_told_at_the_run_s_own_cut(folder: Path, audit: dict[str, Any]) -> None:
    (folder / "audit.json").write_text(json.dumps(audit))
    page = report(folder)
    table = page.tables["What attacks read, k = 1, m = 1 of 3 blocks"]
    assert table["logit_lens"]["item_f1"] == ("0.81 (0.69 to 0.88)", 0.8125)
    assert table["logit_lens"]["target_hit@1"] == ("not measured", None)
    assert table["no states"]["item_f1"][1] == 0.25
    sweep = page.tables[SWEPT]
    assert [row["item_f1"][1] for row in sweep.values()] == [0.4375, 0.8125]
    assert "The server <reads> it." in page.text
    assert "F1 of 0.81, where a guess without any state gives 0.25: what the server could read." in page.text
    assert "another cut" not in page.text
    audit["settings"].pop()
    (folder / "audit.json").write_text(json.dumps(audit))
    assert "at another cut or guard than the run's own" in report(folder).text


@pytest.mark.usefixtures("undrawn")
def test_of_a_guarded_run_the_setting_with_its_guard_is_its_own(
    folder: Path, change: Change, audit: dict[str, Any]
) -> None:
    guarded = {"summary": "states clipped to 3; first cut: ε at most 7", "note": "It covers <states>."}
    change(folder / "metrics.json", lambda told: told.update(states=guarded))
    bare = audit["settings"][1]
    audit["guard"] = "states clipped to 3"
    found = [{"audit": "logit_lens", "knowledge": "own", "item_f1": {"mean": 0.5, "low": 0.25, "high": 0.75}}]
    audit["settings"] = [bare, bare | {"guard": "states clipped to 3", "audits": found, "passes": 1}]
    audit["settings"].append(audit["settings"][1] | {"passes": 12})
    (folder / "audit.json").write_text(json.dumps(audit))
    page = report(folder)
    assert (
        page.tables["What attacks read, k = 1, m = 1 of 3 blocks, states clipped to 3"]["logit_lens"]["item_f1"][1]
        == 0.5
    )
    assert any("mean of 12 passes" in row for row in page.tables[SWEPT])
    assert "What crosses the cut: states clipped to 3; first cut: ε at most 7. It covers <states>." in page.text
    assert "another cut" not in page.text
    audit["settings"].pop()
    audit["settings"].pop()
    (folder / "audit.json").write_text(json.dumps(audit))
    assert "not how the run" in report(folder).text


def test_without_an_audit_the_command_is_told(whole: tuple[Path, Found]) -> None:
    folder, page = whole
    assert f"Measure it with pplr audit {folder}." in page.text
    assert f"could read is not measured (pplr audit {folder})." in page.text


@pytest.mark.usefixtures("undrawn")
def test_epsilon_is_told_with_what_it_covers_and_what_a_ledger_has_booked(folder: Path, change: Change) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("noise_multiplier: null", "noise_multiplier: 1.5", 1))  # of privacy.dp
    spent = {"unit": "user", "adjacency": "add or remove one user", "epsilon": {"0": 1.25, "1": 2.5, "2": 0.5},
             "delta": 1e-5, "note": "It covers <adapters>."}  # fmt: skip
    change(folder / "metrics.json", lambda told: told.update(privacy=spent))
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        for own in record["clients"].values():
            own |= {"epsilon": 1.25, "loss": None, "samples": None, "loss_share": None}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "privacy").mkdir()
    for client, rounds in (("0", [1, 2]), ("1", [1, 2, 3])):
        booked = [{"server_round": number, "start": "ab", "steps": 1} for number in rounds]
        (folder / "privacy" / f"{client}.json").write_text(json.dumps({"booked": booked}))
    page = report(folder)
    table = page.tables["Spent by each client's users"]
    assert {client: row["ε"][1] for client, row in table.items()} == spent["epsilon"]
    assert [table["1"][name][1] for name in ("rounds recorded", "rounds booked")] == [2, 3]
    assert "The ledgers of 1 have booked rounds that are not recorded" in page.text
    assert "It covers <adapters>." in page.text
    assert "ε is at most 2.500 at δ = 1e-05" in page.text
    assert "Training loss was not measured: in training under differential privacy clients tell no loss" in page.text


# -- one file -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_runs_nothing(folder: Path, audit: dict[str, Any]) -> None:
    (folder / "audit.json").write_text(json.dumps(audit))
    page = report(folder)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action"):
            assert value.startswith(("data:", "#")), f"{tag} {name} {value[:60]}"
        assert not name.startswith("on")
    assert svgs(page)
    for svg in svgs(page):
        assert not asks_elsewhere(svg)
    text = (folder / "report.html").read_text()
    assert "default-src 'none'" in text
    assert "@import" not in text


@pytest.mark.parametrize(
    ("svg", "found"),
    [
        ('<image xlink:href="https://example.org/a.png"/>', 1),
        ('<image href="a.png"/><img src="//example.org/b"/>', 2),
        ('<rect style="fill: url(http://example.org/x)"/>', 1),
        ('<use xlink:href="#m1"/><g clip-path="url(#p1)"/><image href="data:image/png;base64,xx"/>', 0),
    ],
)
def test_a_picture_that_would_ask_elsewhere_is_found(svg: str, found: int) -> None:
    assert len(asks_elsewhere(svg)) == found


def test_the_page_can_be_read_without_seeing_it(whole: tuple[Path, Found]) -> None:
    page = whole[1]
    assert page.images
    assert all(len(own["alt"]) > 20 for own in page.images)
    assert len(page.ids) == len(set(page.ids))
    anchors = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert anchors <= set(page.ids)
    assert page.tags.count("h1") == 1
    assert ("html", "lang", "en") in page.attributes
    assert page.tags.count("caption") == page.tags.count("table")


def test_the_same_files_give_the_same_bytes(folder: Path) -> None:
    assert write_report(folder, samples=50).read_bytes() == write_report(folder, samples=50).read_bytes()


def test_no_text_of_a_run_is_taken_for_markup(folder: Path, change: Change, audit: dict[str, Any]) -> None:
    def rename(told: dict[str, Any], *groups: str) -> None:
        for group in groups:
            told[group][MARKUP] = told[group].pop("0")

    change(folder / "metrics.json", lambda told: (rename(told, "clients"), told["floors"].update({MARKUP: {}})))
    change(folder / "provenance.json", lambda told: (rename(told, "clients"), told["clients"].update({"1": MARKUP})))
    lines = (folder / "rounds.jsonl").read_text().replace('"0":', json.dumps(MARKUP) + ":")
    (folder / "rounds.jsonl").write_text(lines)
    audit["verdict"] = audit["settings"][0]["audits"][0]["audit"] = MARKUP
    (folder / "audit.json").write_text(json.dumps(audit))
    page = report(folder)
    assert "script" not in page.tags
    assert f"client {MARKUP}" in page.tables["Test figures, means over users, on the full catalog"]
    assert not any("<script" in svg for svg in svgs(page))
    assert any("$y$" in re.sub("<!--.*?-->", "", svg, flags=re.DOTALL) for svg in svgs(page))


# -- what is not there --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_run_under_way_is_told_as_far_as_it_is(folder: Path) -> None:
    for name in ("metrics.json", "evaluation.json"):
        (folder / name).unlink()
    first = (folder / "rounds.jsonl").read_text().splitlines()[0]
    (folder / "rounds.jsonl").write_text(first + "\n")
    page = report(folder)
    assert "This run is under way, or was stopped: 1 of at most 2 server rounds are done" in page.text
    assert f"--run-dir {folder} --resume" in page.text
    assert "Test figures are not measured" in page.text
    assert "Server round 1, the last; all are in rounds.jsonl" in page.tables
    sides = page.tables["Each side, beside holding the whole model"]
    assert sides["client"]["stored, frozen tensors"] == ("not measured", None)


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_has_only_begun_has_a_report_too(folder: Path) -> None:
    for name in ("metrics.json", "evaluation.json", "rounds.jsonl", "provenance.json"):
        (folder / name).unlink()
    page = report(folder)
    assert "No server round is finished yet." in page.text
    assert "provenance.json is missing" in page.text
    assert not page.images


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_before_compute_was_worked_out_has_none(folder: Path, change: Change) -> None:
    def forget(told: dict[str, Any]) -> None:
        told["cost"].pop("whole")
        for party in ("client", "server"):
            told["cost"][party]["train_flops"] = None

    change(folder / "metrics.json", forget)
    page = report(folder)
    table = page.tables["Each side, beside holding the whole model"]
    assert {row[WORKED_OUT] for row in table.values()} == {("not measured", None)}
    stored = [table[name]["stored, frozen tensors"][1] for name in table]
    assert stored[0] + stored[1] == stored[2]
    assert "Training compute was not worked out for this run." in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_is_never_0(folder: Path, change: Change) -> None:
    def forget(told: dict[str, Any]) -> None:
        told["clients"]["0"] = dict.fromkeys(told["clients"]["0"])
        told["cost"] = {party: dict.fromkeys(own) for party, own in told["cost"].items()}
        told["seconds"] = dict.fromkeys(told["seconds"])

    change(folder / "metrics.json", forget)
    page = report(folder)
    row = page.tables["Test figures, means over users, on the full catalog"]["client 0"]
    assert {shown for name, shown in row.items() if name} == {("not measured", None)}
    for name in ("client", "server", "the whole model in one place"):
        row = page.tables["Each side, beside holding the whole model"][name]
        assert {shown for heading, shown in row.items() if heading} == {("not measured", None)}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", "[]", "metrics.json is damaged or of another version"),
        ("metrics.json", '{"method": "pplr", "backbone": "causal_lm", "overall": {"mrr": NaN}}', "overall.mrr"),
        ("rounds.jsonl", '{"server_round": 1}\n', "line 1, clients: Field required"),
        ("rounds.jsonl", "\xff", "rounds.jsonl is damaged"),
        ("provenance.json", '{"seed": "x"}', "seed"),
        ("audit.json", '{"settings": []}', "pplr audit"),
        ("evaluation.json", "{", "evaluation.json is damaged"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: str, told: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=re.escape(told)) as error:
        write_report(folder)
    assert name in str(error.value)


def test_a_similarity_that_does_not_fit_the_clients_is_refused(folder: Path, change: Change) -> None:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    lines[1]["similarity"] = [[1.0]]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r"line 2.*similarity"):
        read_run(folder)


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_where_the_report_is(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder), "--samples", "20"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"written: {folder / 'report.html'}")
    out = tmp_path / "elsewhere.html"
    done = CliRunner().invoke(app, ["report", str(folder), str(folder), "--out", str(out), "--samples", "20"])
    assert done.exit_code == 0, done.output
    assert "Beside other runs" in out.read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, "is not a run folder" in done.stderr) == (1, True)


def test_the_word_private_stands_beside_a_figure_or_the_audit(whole: tuple[Path, Found]) -> None:
    page = whole[1]
    assert not re.search(r"\bprivate\b", page.text, re.IGNORECASE)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_about_reports_work(finished: Callable[..., Run], tmp_path: Path) -> None:
    cutoffs = list(Config().evaluation.cutoffs)  # those that a run has where nobody chose others
    folder = Path(shutil.copytree(finished(f"evaluation.cutoffs={cutoffs}").folder, tmp_path / "run"))
    page = (Path(__file__).parents[3] / "docs" / "report.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        told = line.replace("OTHER_RUN_DIR", "RUN_DIR").replace("RUN_DIR", str(folder)).split()
        done = CliRunner().invoke(app, [part.replace("compared.html", str(tmp_path / "c.html")) for part in told[1:]])
        assert done.exit_code == 0, done.output
