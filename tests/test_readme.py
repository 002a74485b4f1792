"""What the README shows is run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.docs.pages import blocks, commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS += sorted(path for name in ("concepts", "howto", "reference") for path in (ROOT / "docs" / name).glob("*.md"))


@pytest.fixture
def tiny_quickstart(data_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, whose `configs/quickstart.yaml` is the quickstart's model and data in small."""
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    items = data / "tiny.item"
    items.write_text(items.read_text().replace("Ash\n", "Toy Story (1995)\n").replace("Alder\n", "Aladdin (1992)\n"))
    (tmp_path / "configs").mkdir()
    small = {
        "data": {"source": "recbole", "path": str(data), "partition": {"by": "random", "min_users": 1}},
        "backbone": {"name": "item_vectors", "model": str(model_folder), "dtype": "float32"},
        "cut": {"input_layers": 1, "output_layers": 1},
        "training": {"samples": 10},
        "evaluation": {"test_users": 4, "validation_users": 1, "max_new_tokens": 4},
    }
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_demo_trains_and_recommends(tiny_quickstart: Path) -> None:
    from pplr.apps.cli import app

    assert "```sh\nmake demo " in README
    recipe = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo", "USER_ID=u3", "PYTHON=false"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    commands = [shlex.split(line)[1:] for line in recipe.splitlines() if line.startswith(".venv/bin/pplr ")]
    assert [words[0] for words in commands] == ["train", "recommend"]
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert "history of user u3" in result.output
    assert len(result.output.split("rank")[1].splitlines()) > 10


def test_the_installed_package_leads_from_a_configuration_to_a_recommendation(tiny_quickstart: Path) -> None:
    from pplr.apps.cli import app

    (block,) = (own for own in blocks(ROOT / "README.md") if own.kind == "sh" and "pplr init" in own.text)
    for program, *words in commands(block):
        assert program == "pplr"
        if words[0] == "train":  # what `init` wrote is of real size
            assert Path("quickstart.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
            shutil.copy("configs/quickstart.yaml", "quickstart.yaml")
        result = CliRunner().invoke(app, ["u3" if word == "50" else word for word in words])
        assert result.exit_code == 0, result.output
    assert "history of user u3" in result.output


def test_the_python_snippet_runs_as_it_stands(tiny_quickstart: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 1
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(snippets[0], "README.md", "exec"), {})
    lines = told.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "{'recall@10':", "1", "2", "3", "4", "5"]


def test_the_quickstart_page_shows_the_readme_itself() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shown = [README.split(start)[1].split(end)[0] for start, end in re.findall(
        r':start-after: "(.*)"\n:end-before: "(.*)"', page)]  # fmt: skip
    assert "make demo" in shown[0]
    assert "pplr.train(" in shown[1]
    assert all(README.count(f"\n{heading}\n") == 1 for heading in re.findall(r'(?:after|before): "(.*)"', page))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_commands_of_the_table_exist() -> None:
    from pplr.apps.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {group.name for group in app.registered_groups if group.name}
    told = set(re.findall(r"^\| `pplr (\w+)", README, flags=re.MULTILINE))
    assert told == names


def test_every_extra_of_a_user_is_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (told,) = re.findall(r"names its extra: (.*?)\.\n", README, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", told)) == set(extras) - {"docs", "dev"}


def test_every_reference_that_the_code_cites_is_in_the_bibliography() -> None:
    known = set(re.findall(r"@\w+\{(\w+),", (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")))
    cited = set()
    for path in (ROOT / "src").rglob("*.py"):
        for block in re.findall(r"Cites:\n\s+(\w+)", path.read_text(encoding="utf-8")):
            cited.add(block)
    assert cited
    assert cited <= known
