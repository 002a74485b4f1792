"""A configuration to start from, for whoever has no repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import pplr
from pplr.apps import starting
from pplr.apps.cli import app
from pplr.config_files import load_config
from pplr.errors import ConfigError
from pplr.testing import refuses

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str):
    return CliRunner().invoke(app, ["init", *arguments])


def test_it_writes_the_quickstart(tmp_path: Path) -> None:
    done = run()
    assert (done.exit_code, done.stdout) == (0, "written: quickstart.yaml\ntrain with: pplr train quickstart.yaml\n")
    assert (tmp_path / "quickstart.yaml").read_bytes() == (CONFIGS / "quickstart.yaml").read_bytes()
    assert load_config(tmp_path / "quickstart.yaml") == load_config(CONFIGS / "quickstart.yaml")


def test_it_writes_another_to_another_place(tmp_path: Path) -> None:
    done = run("movielens_pplr", "--out", "my runs/paper.yaml")
    assert done.exit_code == 0
    assert "pplr train 'my runs/paper.yaml'" in done.stdout
    assert (tmp_path / "my runs" / "paper.yaml").read_bytes() == (CONFIGS / "movielens_pplr.yaml").read_bytes()


def test_it_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("mine")
    done = run()
    assert done.exit_code == 1
    assert "quickstart.yaml is there already" in done.stderr
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


def test_a_name_that_is_mistyped_is_refused_with_the_nearest(tmp_path: Path) -> None:
    done = run("quikstart")
    assert done.exit_code == 1
    assert "Did you mean 'quickstart'?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_list_names_all_with_what_they_are(tmp_path: Path) -> None:
    done = run("--list")
    assert done.exit_code == 0
    assert set(starting.shipped_configs()) == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in starting.shipped_configs():
        assert f"\n{name} " in done.stdout
    assert "The demo of RecFormer: five clients" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "site-packages" / "pplr"
    (inside / "configs").mkdir(parents=True)
    (inside / "configs" / "own.yaml").write_text("# Mine. Alone.\n")
    monkeypatch.setattr(pplr, "__file__", str(inside / "__init__.py"))
    assert starting.shipped_configs() == {"own": inside / "configs" / "own.yaml"}
    (inside / "configs" / "own.yaml").unlink()
    with refuses(ConfigError, "no configurations are in"):
        starting.shipped_configs()
