"""What the README shows is run."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS += sorted(path for name in ("concepts", "howto", "reference") for path in (ROOT / "docs" / name).glob("*.md"))


def test_the_python_snippet_runs_as_it_stands(
    data_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 1
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
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(snippets[0], "README.md", "exec"), {})
    lines = told.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "{'recall@10':", "1", "2", "3", "4", "5"]


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


def test_every_reference_that_the_code_cites_is_in_the_bibliography() -> None:
    known = set(re.findall(r"@\w+\{(\w+),", (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")))
    cited = set()
    for path in (ROOT / "src").rglob("*.py"):
        for block in re.findall(r"Cites:\n\s+(\w+)", path.read_text(encoding="utf-8")):
            cited.add(block)
    assert cited
    assert cited <= known
