"""The how-to pages, carried out from top to bottom with a tiny model, in one folder."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

import pplr
from pplr.apps.cli import app
from tests.docs.pages import DOCS, blocks, carried_out, told

pytestmark = pytest.mark.slow

QUICK = {
    "backbone": {"dtype": "float32", "max_tokens": 256},
    "training": {"batch_size": 4, "learning_rate": 0.01},
    "evaluation": {"beams": 2, "max_new_tokens": 4},
    "runtime": {"threads": 1},
}
"""Laid over the pages' configurations, so that a run takes seconds."""


def configuration(page: str) -> dict:
    (block,) = (block for block in blocks(DOCS / "howto" / page) if block.kind == "yaml")
    found = yaml.safe_load(block.text)
    for section, fields in QUICK.items():
        found[section] = {**fields, **found.get(section, {})}
    return found


def write_games(folder: Path) -> None:
    """Write a few reviews and titles as Amazon's files of 2018 have them: five kinds of players and games."""
    folder.mkdir(parents=True)
    reviews = [
        {
            "reviewerID": f"r{kind}{user}",
            "asin": f"g{kind}{(user + at) % 7}",
            "overall": 5.0,
            "unixReviewTime": at,
        }
        for kind in range(5)
        for user in range(8)
        for at in range(5)
    ]
    games = [{"asin": f"g{kind}{game}", "title": f"Game {kind}.{game}"} for kind in range(5) for game in range(7)]
    for name, rows in (("Video_Games_5", reviews), ("meta_Video_Games", games)):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture(scope="module")
def carry_out(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Callable[[str], str]]:
    """Carry out every command of a page in one folder, which pages share, and return what they printed."""
    folder = tmp_path_factory.mktemp("howto")
    shutil.copy(Path(__file__).parent / "loans.csv", folder)
    shutil.copytree(model_folder, folder / "models" / "our-llama")
    settings = configuration("own_data.md")
    settings["backbone"]["model"] = "models/our-llama"
    (folder / "library.yaml").write_text(yaml.safe_dump(settings))
    write_games(folder / "data" / "amazon-games-2018")

    def carry_out(page: str) -> str:
        here = {"RUN_DIR": "runs/library", "smollm2-135m": "models/our-llama"}
        printed = ""
        for program, *words in told(DOCS / "howto" / page, here):
            assert program == "pplr"
            printed += carried_out(words)
        return printed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        yield carry_out


@pytest.fixture(scope="module")
def library(carry_out: Callable[[str], str]) -> str:
    """What the page on own data printed; its run is what other pages look at."""
    return carry_out("own_data.md")


def test_own_data_leads_from_a_table_to_lists(library: str) -> None:
    assert "run folder: runs/library" in library
    assert "14 users, 12 items" in library
    assert re.search(r"interactions +200\n", library)  # the games, read as they come
    run = pplr.open_run("runs/library")
    assert sum(client["users"] for client in run.metrics["clients"].values()) == 14
    assert len(run.rounds) == 2
    lists = pl.read_csv("lists.csv")
    assert lists["user"].n_unique() == 14
    borrowed = pl.read_csv("loans.csv").rename({"reader": "user"})
    assert lists.join(borrowed, on=["user", "title"], how="semi").is_empty()  # nobody is told what they had


def test_own_model_is_planned_cut_and_trained(carry_out: Callable[[str], str], library: str) -> None:
    printed = carry_out("own_model.md")
    assert "client" in printed
    assert {path.name for path in Path("cut").iterdir()} == {"client", "server"}
    settings = configuration("own_data.md") | {"federation": {"clients": 2, "rounds": 1}}
    settings |= {key: {**settings.get(key, {}), **own} for key, own in configuration("own_model.md").items()}
    Path("model.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["train", "model.yaml"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(Path("runs/model/metrics.json").read_text())
    assert metrics["backbone"] == "causal_lm"
    assert metrics["cut"] == {"input_layers": 1, "output_layers": 1, "total_layers": 3}


def test_a_cut_is_chosen_by_its_cost_and_by_what_it_lets_out(carry_out: Callable[[str], str], library: str) -> None:
    printed = carry_out("choose_a_cut.md")
    assert "client memory" in printed
    settings = json.loads(Path("runs/library/audit.json").read_text())["settings"]
    assert [(own["cut"]["input_layers"], own["cut"]["output_layers"]) for own in settings] == [(1, 0), (1, 1)]


def test_an_audit_says_what_was_read(carry_out: Callable[[str], str], library: str) -> None:
    printed = carry_out("audit.md")
    assert "written: runs/library/audit.json" in printed
    assert "mean of 3 passes" in printed


def test_a_run_goes_on(carry_out: Callable[[str], str], library: str) -> None:
    printed = carry_out("resume.md")
    assert "run folder: runs/long" in printed
    assert len(pplr.open_run("runs/long").rounds) == 2
