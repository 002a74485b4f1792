from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from pplr import __version__
from pplr.apps.cli import app
from pplr.config import Config
from pplr.config_files import load_config
from pplr.errors import PartitionError, RunError
from pplr.runtimes.address import StageServerAt

HEAVY = {"torch", "transformers", "peft", "polars", "sklearn", "scipy", "numpy", "implicit", "safetensors"}
MARKUP = "[bold]x[/bold] (1999)"
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def one_line(result: Any, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    return str(line)


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


# -- what it loads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import pplr",
        "import pplr.apps.cli",
        "import sys; from pplr.apps.cli import app; app(['--help'], standalone_mode=False)",
        "import sys; from pplr.apps.cli import app; app(['train', '--help'], standalone_mode=False)",
        "import sys; from pplr.apps.cli import app; app(['--version'], standalone_mode=False)",
    ],
)
def test_help_loads_nothing_heavy(code: str) -> None:
    done = python(f"{code}\nimport sys; print('\\nLOADED', *(name.split('.')[0] for name in sys.modules))")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "pplr" in loaded
    assert not loaded & HEAVY


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"pplr {__version__}\n")


# -- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("bogus",),
        ("train",),
        ("train", "c.yaml", "--rum-dir", "x"),
        ("data", "fetch"),
        ("data", "import", "log.csv", "--user-column", "u"),
        ("data", "import", "l.csv", "--user-column=u", "--item-column=i", "--out=o", "--attribute=user"),
        ("evaluate",),
        ("compare",),
        ("config",),
        ("config", "c.yaml", "--template"),
        ("recommend", "runs/a", "--client", "0"),
        ("recommend", "runs/a", "--client", "0", "--user", "1", "--history", "A"),
        ("recommend", "runs/a", "--client", "0", "--history", " ; "),
        ("recommend", "runs/a", "--client", "0", "--user", "1", "--count", "0"),
        ("recommend", "runs/a", "--client", "0", "--all"),
        ("recommend", "runs/a", "--client", "0", "--out", "a.csv"),
        ("recommend", "runs/a", "--all", "--out", "a.csv", "--user", "1"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# -- config -------------------------------------------------------------------------------------------------------


def test_the_template_reads_back_as_the_defaults(tmp_path: Path) -> None:
    result = run("config", "--template")
    assert result.exit_code == 0
    path = tmp_path / "template.yaml"
    path.write_text(result.stdout, encoding="utf-8")
    assert load_config(path) == Config()


def test_a_configuration_is_shown_resolved(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("federation: {rounds: 7}\n")
    result = run("config", str(path), "--set", "run.seed=3")
    content = yaml.safe_load(result.stdout)
    assert (content["federation"]["rounds"], content["run"]["seed"]) == (7, 3)
    assert content["training"]["batch_size"] == Config().training.batch_size


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("config", "nope.yaml"), "error: cannot read the configuration nope.yaml: No such file or directory."),
        (("train", "nope.yaml"), "Give the path of a YAML file."),
        (("data", "describe", "nope.yaml"), "nope.yaml"),
        (("config", "--set", "federation.ronuds=3"), "unknown key 'federation.ronuds'. Did you mean 'rounds'?"),
        (("config", "--set", "federation.rounds"), "has no '='"),
        (("config", "--set", "federation.rounds=0"), "federation.rounds"),
        (("data", "fetch", "movielens-10k"), "Did you mean 'movielens-100k'?"),
        (("data", "fetch", "table"), "data.path"),
        (("data", "describe", "--set", "data.source=table", "--set", "data.path=nope.csv"), "nope.csv"),
    ],
)
def test_an_expected_error_is_one_line_with_its_cure(arguments: tuple[str, ...], told: str) -> None:
    line = one_line(run(*arguments))
    assert line.startswith("error: ")
    assert told in line


# -- data ---------------------------------------------------------------------------------------------------------


def write_log(tmp_path: Path) -> Path:
    log = tmp_path / "log.csv"
    rows = [
        f"u{user},{item},{user * 100 + item},{'north' if user % 2 else 'south'}"
        for user in range(9)
        for item in range(5)
    ]
    log.write_text("who,what,when,region\n" + "\n".join(rows) + "\n")
    (tmp_path / "items.csv").write_text("what,name\n" + "".join(f"{item},{MARKUP} {item}\n" for item in range(5)))
    return log


def test_a_table_becomes_a_folder_that_can_be_described(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    columns = ["--user-column=who", "--item-column=what", "--title-column=name", "--timestamp-column=when"]
    more = ["--items-file", str(tmp_path / "items.csv"), "--attribute", "region", "--out", str(tmp_path / "shop")]
    result = run("data", "import", str(log), *columns, *more)
    assert result.exit_code == 0, result.output
    assert "9 users, 5 items, 45 interactions" in result.stdout
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == ["shop.inter", "shop.item", "shop.user"]
    config = tmp_path / "c.yaml"
    by_region = "partition: {by: column, column: region, min_users: 1}"
    config.write_text(f"data: {{source: recbole, path: shop, {by_region}}}\nfederation: {{clients: 2}}\n")
    result = run("data", "describe", str(config))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["interactions", "45"] in lines
    assert ["0", "region:", "south", "5", "25", "5", "10", "5", "5"] in lines
    assert ["1", "region:", "north", "4", "20", "4", "8", "4", "4"] in lines
    again = run("data", "import", str(log), *columns, *more)
    assert "already holds shop.inter" in one_line(again)


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    result = run("data", "import", str(log), "--user-column", "whom", "--item-column", "what", "--out", "shop")
    assert "Did you mean 'who'?" in one_line(result)
    assert not Path("shop").exists()


def test_data_that_cannot_be_shared_out_is_described_before_the_error(tmp_path: Path) -> None:
    write_log(tmp_path)
    settings = ["data.source=table", "data.path=log.csv", "data.columns={user: who, item: what}"]
    result = run("data", "describe", *(part for setting in settings for part in ("--set", setting)))
    assert "too few for 5 clients" in one_line(result)
    assert ["users", "9"] in [line.split() for line in result.stdout.splitlines()]


def test_a_source_is_fetched_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pplr.data.sources import registry

    def fetch(notify: Callable[[str], None]) -> Path:
        notify(f"fetched {MARKUP}")
        return tmp_path / "there"

    found = registry.Source("mine", "My own.", "x.csv", lambda path, config: None, fetch)  # type: ignore[arg-type,return-value]
    monkeypatch.setitem(registry._SOURCES, "mine", found)
    result = run("data", "fetch", "mine")
    assert result.stdout.splitlines() == [f"fetched {MARKUP}", f"mine is in {tmp_path / 'there'}"]
    assert "mine: My own." in run("data", "fetch", "--help").stdout


# -- runs ---------------------------------------------------------------------------------------------------------


def test_training_tells_its_rounds_and_ends_with_the_table(
    runtime: SimpleNamespace, fake_run: Make, round_record: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def train(config: Config, folder: Path, *, resume: bool, progress: Any, stage_server: Any) -> Any:
        seen.update(config=config, folder=folder, resume=resume, server=stage_server)
        with progress.task("server round 1, client 0", 64, "samples") as advance:
            advance(64)
        progress.server_round(round_record)
        return fake_run(str(folder))

    runtime.train = train
    Path("shop.yaml").write_text("federation: {rounds: 3}\n")
    result = run("train", "shop.yaml", "--set", "run.seed=4")
    assert result.exit_code == 0, result.output
    assert (seen["folder"], seen["resume"], seen["config"].run.seed) == (Path("runs/shop"), False, 4)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("server round 1, client 0: 64/64 samples, ")
    assert "server round 1 of 3" in lines
    assert any(line.startswith("overall") for line in lines)
    assert lines[-1] == "run folder: runs/shop"
    assert seen["server"] is None
    run("train", "shop.yaml", "--run-dir", "elsewhere", "--resume", "--kit", "kits", "--stage-server", "there:1")
    assert (seen["folder"], seen["resume"]) == (Path("elsewhere"), True)
    assert seen["server"] == StageServerAt(Path("kits"), "there:1")


@pytest.mark.parametrize("command", [("evaluate",), ("recommend", "--client", "0", "--user", "1")])
def test_a_kit_alone_leads_to_its_server_and_an_address_alone_to_nobody(
    command: tuple[str, ...], runtime: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Any:
        raise RunError("seen", cure="Stop.")

    runtime.open_run = refuse
    name, *options = command
    run(name, "runs/a", *options, "--kit", "kits")
    monkeypatch.setenv("PPLR_KIT", "elsewhere")
    run(name, "runs/a", *options)
    assert runtime.servers == [StageServerAt(Path("kits")), StageServerAt(Path("elsewhere"))]
    monkeypatch.delenv("PPLR_KIT")
    alone = run(name, "runs/a", *options, "--stage-server", "there:1")
    assert alone.exit_code == 2
    assert "--kit" in alone.output


def test_ctrl_c_says_in_one_line_how_to_go_on(runtime: SimpleNamespace) -> None:
    def train(config: Config, folder: Path, **options: Any) -> Any:
        raise KeyboardInterrupt

    runtime.train = train
    Path("my shop.yaml").write_text("{}")
    result = run("train", "my shop.yaml", "--set", "run.seed=4", "--set", "data.columns={user: u}")
    assert one_line(result, 130) == (
        "stopped. Go on with: pplr train 'my shop.yaml' --set run.seed=4 --set 'data.columns={user: u}' "
        "--run-dir 'runs/my shop' --resume"
    )


def test_ctrl_c_elsewhere_is_one_line_too(runtime: SimpleNamespace) -> None:
    def interrupt(folder: Path) -> Any:
        raise KeyboardInterrupt

    runtime.open_run = interrupt
    assert one_line(run("evaluate", "runs/a"), 130) == "stopped"


def test_an_unexpected_error_keeps_its_traceback(runtime: SimpleNamespace) -> None:
    def broken(folder: Path) -> Any:
        raise ZeroDivisionError

    runtime.open_run = broken
    assert isinstance(run("evaluate", "runs/a").exception, ZeroDivisionError)


def test_an_error_of_many_lines_is_still_one(runtime: SimpleNamespace) -> None:
    def refuse(folder: Path) -> Any:
        raise RunError(f"{folder} is\nno run \x1b[31m{MARKUP}", cure="Train\none.")

    runtime.open_run = refuse
    assert one_line(run("evaluate", "runs/a")) == f"error: runs/a is no run [31m{MARKUP}. Train one."


def test_evaluation_prints_the_table(runtime: SimpleNamespace, fake_run: Make, metrics: Make) -> None:
    runtime.open_run = lambda folder: fake_run(str(folder), evaluate=lambda progress: metrics("fedavg"))
    result = run("evaluate", "runs/a")
    assert result.exit_code == 0
    assert result.stdout.startswith("fedavg, causal_lm")


@pytest.mark.parametrize("command", [("evaluate",), ("compare",), ("recommend", "--client", "0", "--user", "1")])
def test_a_folder_that_is_no_run_is_one_line(command: tuple[str, ...], runtime: SimpleNamespace) -> None:
    def refuse(folder: Path) -> Any:
        raise RunError(f"{folder} is not a run folder", cure="Give one that `pplr train` made.")

    runtime.open_run = refuse
    name, *options = command
    assert one_line(run(name, "nowhere", *options)).startswith("error: nowhere is not a run folder. Give one")


def test_recommendations_show_the_history_and_titles_as_they_are(runtime: SimpleNamespace, fake_run: Make) -> None:
    asked: dict[str, Any] = {}

    def recommend(client: str | None, **options: Any) -> list[Any]:
        asked.update(options, client=client)
        return [SimpleNamespace(rank=1, item_id="[red]7", title=MARKUP, score=-0.5)]

    runtime.open_run = lambda folder: fake_run(
        recommend=recommend, history_titles=lambda user: [f"{MARKUP} {number}" for number in range(12)]
    )
    result = run("recommend", "runs/a", "--client", "0", "--user", "12", "--count", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "history of user 12, the newest 10 of 12, oldest first:"
    assert lines[1:11] == [f"  {MARKUP} {number}" for number in range(2, 12)]
    assert lines[-3].split() == ["rank", "title", "score", "item"]
    assert lines[-1].split() == ["1", "[bold]x[/bold]", "(1999)", "-0.5000", "[red]7"]
    assert (asked["client"], asked["user"], asked["history"], asked["count"]) == ("0", "12", None, 1)
    result = run("recommend", "runs/a", "--client", "0", "--history", " A (1999);B; ;")
    assert (asked["user"], asked["history"]) == (None, ["A (1999)", "B"])
    assert result.stdout.splitlines()[:3] == ["history, oldest first:", "  A (1999)", "  B"]


def test_lists_of_every_user_are_one_file(runtime: SimpleNamespace, fake_run: Make, tmp_path: Path) -> None:
    asked: list[Any] = []

    def recommend_all(client: str | None, **options: Any) -> list[Any]:
        asked.append((client, options["count"]))
        item = SimpleNamespace(rank=1, item_id="i,7", title='The "Best" One', score=-0.5)
        return [SimpleNamespace(client="0", user="u1", items=(item,)), SimpleNamespace(client="0", user="u2", items=())]

    runtime.open_run = lambda folder: fake_run(recommend_all=recommend_all)
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"lists.{ending}"
        result = run("recommend", "runs/a", "--client", "0", "--all", "--out", str(out), "--count", "3")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"written: {out}, 1 items for 2 users\n"
        read = {"csv": pl.read_csv, "jsonl": pl.read_ndjson, "parquet": pl.read_parquet}[ending](out)
        assert read.columns == ["client", "user", "rank", "item", "title", "score"]
        assert [str(cell) for cell in read.row(0)] == ["0", "u1", "1", "i,7", 'The "Best" One', "-0.5"]
    assert asked == [("0", 3)] * 3
    wrong = run("recommend", "runs/a", "--all", "--out", str(tmp_path / "lists.txt"))
    assert one_line(wrong).endswith("Let it end with one of: .csv, .jsonl, .parquet.")
    assert len(asked) == 3


def test_a_user_of_another_client_is_one_line(runtime: SimpleNamespace, fake_run: Make) -> None:
    def recommend(client: str, **options: Any) -> Any:
        raise PartitionError("user '9' is a user of client 1, not of client 0", cure="Use --client 1.")

    runtime.open_run = lambda folder: fake_run(recommend=recommend)
    assert one_line(run("recommend", "runs/a", "--client", "0", "--user", "9")).endswith("Use --client 1.")


def test_runs_are_compared_with_the_first(runtime: SimpleNamespace, fake_run: Make, evaluation: Make) -> None:
    runtime.open_run = lambda folder: fake_run(
        str(folder), tested=evaluation([0.5, 0.75, 1.0] if "better" in str(folder) else [0.0, 0.25, 0.5])
    )
    result = run("compare", "runs/a", "runs/better", "--metric", "ndcg@10", "--samples", "50")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1].split()
    assert last == ["runs/better", "ndcg@10", "3", "+0.5000", "+0.5000", "to", "+0.5000", "0.0392", "yes"]
    alone = run("compare", "runs/a")
    assert "against" not in alone.stdout
    assert "Did you mean 'ndcg@10'?" in one_line(run("compare", "runs/a", "--metric", "ndcg@1"))


# -- pipes and disks ----------------------------------------------------------------------------------------------

MAIN = [sys.executable, "-c", "from pplr.apps.cli import main; main()"]


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen([*MAIN, "config", "--template"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), told) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*MAIN, "config", "--template"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1)
    assert done.stderr.startswith(b"error: no space left")


def test_a_terminal_that_knows_no_unicode_gets_question_marks(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    columns = ["--user-column=who", "--item-column=what", "--out", str(tmp_path / "café")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*MAIN, "data", "import", log, *columns], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf?.inter" in done.stdout


def test_a_command_whose_extra_is_missing_says_how_to_install_it(monkeypatch, tmp_path):
    import sys

    from typer.testing import CliRunner

    from pplr.apps.cli import app

    for name in [name for name in sys.modules if name.startswith(("cryptography", "pplr.runtimes.identity"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "pplr.runtimes.certificates", raising=False)
    told = CliRunner().invoke(app, ["enroll", "list", "--federation", str(tmp_path)])
    assert told.exit_code == 1
    assert "pip install 'pplr[network]'" in told.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_briefly_unless_told_otherwise(before: dict[str, str], after: dict[str, str]) -> None:
    own = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    code = "import os, sys; from pplr.apps import cli; cli.app = lambda **_: print(dict(os.environ)); cli.main()"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**own, **before}, capture_output=True, text=True, check=True
    )
    seen = ast.literal_eval(told.stdout)
    assert {name: seen[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in seen} == after
