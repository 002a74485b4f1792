from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pplr.apps.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_cut_writes_both_bundles_and_says_their_sizes(model_folder, tmp_path) -> None:
    told = run("cut", str(model_folder), "--input-layers", "1", "--output-layers", "1", "--out", str(tmp_path / "cut"))
    assert told.exit_code == 0, told.output
    lines = [line.split() for line in told.output.splitlines()]
    assert ["client", "2"] in [line[:2] for line in lines]
    assert ["server", "1"] in [line[:2] for line in lines]
    assert (tmp_path / "cut" / "client" / "tokenizer.json").exists()
    assert not (tmp_path / "cut" / "server" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--input-layers", "2", "--output-layers", "1"), "leaves the server none"),
        (("--input-layers", "3", "--output-layers", "0"), "all 3 blocks on the client"),
    ],
)
def test_a_cut_that_does_not_fit_writes_nothing(model_folder, tmp_path, arguments, words) -> None:
    told = run("cut", str(model_folder), *arguments, "--out", str(tmp_path / "cut"))
    assert told.exit_code == 1
    assert words in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert not (tmp_path / "cut").exists()


def test_plan_says_which_cuts_fit(model_folder, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table is printed in parts
    told = run("plan", str(model_folder), "--storage", "1GB", "--samples", "2", "--tokens", "20", "--dtype", "float32")
    assert told.exit_code == 0, told.output
    rows = [line.split() for line in told.output.splitlines() if line[:6].strip().isdigit()]
    assert ["0", "0"] in [row[:2] for row in rows]
    assert {row[-1] for row in rows} == {"yes"}
    assert {row[-2] for row in rows} == {"-"}
    none = run("plan", str(model_folder), "--memory", "1KB", "--samples", "2", "--tokens", "20")
    assert "No cut fits" in none.output


def test_plan_refuses_what_is_no_size_and_usage_that_makes_no_sense(model_folder) -> None:
    told = run("plan", str(model_folder), "--memory", "much")
    assert told.exit_code == 1
    assert "is not a size" in told.stderr
    assert run("plan", str(model_folder), "--tokens", "5", "--targets", "9").exit_code == 2
