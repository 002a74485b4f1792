"""From a clone to a recommendation: what is run, in which order, and the README's sentence."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_contact
from benchmarks.first_contact import CLOSES, OPENS, README, RESULTS, measure, sentence, write_readme

MAKEFILE = """
.venv/.installed:
	@mkdir -p .venv && touch $@ && echo installed with "$(PIP_ARGS)" >> ../order

demo: .venv/.installed
	@echo training with cache $$PPLR_CACHE and pip $$PIP_NO_CACHE_DIR >> ../order
	@echo "run folder: runs/demo"
	@sleep 0.3 && echo recommending >> ../order
"""


def content(total: float = 6.25) -> dict[str, Any]:
    minutes = {"clone": 0.05, "install": 2.04, "fetch and train": 4.0, "recommend": 0.16, "total": total}
    machine = {"processor": "a processor", "python": "3.11.7"}
    return {"minutes": minutes, "machine": machine, "cores": 2, "installed": {"torch": "2.13", "transformers": "5.2"}}


def test_it_clones_installs_trains_and_recommends_in_this_order(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    folder.mkdir()
    (source / "Makefile").write_text(MAKEFILE)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *words], cwd=source, check=True)
    minutes = measure(source, folder, "--a b")
    assert (folder / "order").read_text().splitlines() == [
        "installed with --a b",
        f"training with cache {folder / 'cache'} and pip 1",
        "recommending",
    ]
    assert list(minutes) == ["clone", "install", "fetch and train", "recommend", "total"]
    assert minutes["total"] == pytest.approx(sum(own for step, own in minutes.items() if step != "total"))
    assert minutes["recommend"] * 60 >= 0.3 > minutes["install"]


def test_a_step_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"git clone .* ended with"):
        measure(tmp_path / "nothing", tmp_path)


def test_a_busy_machine_is_refused() -> None:
    first_contact.refuse_a_busy_machine(0.4, 2)
    with pytest.raises(SystemExit, match="when nothing else runs"):
        first_contact.refuse_a_busy_machine(0.6, 2)


def test_the_sentence_is_written_between_its_marks_again_and_again(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{OPENS}\n{CLOSES}\nafter\n")
    write_readme(readme, tmp_path)
    assert readme.read_text() == f"before\n{OPENS}\n{CLOSES}\nafter\n"
    for total in (6.25, 5.0):
        (tmp_path / "first_contact.json").write_text(json.dumps(content(total)))
        write_readme(readme, tmp_path)
        assert readme.read_text() == f"before\n{OPENS}\n{sentence(content(total))}\n{CLOSES}\nafter\n"
    assert "recommendation: 5.0 minutes on 2 cores of a processor, 2.0 of them to install" in readme.read_text()
    readme.write_text("none")
    with pytest.raises(SystemExit, match="put both where the sentence belongs"):
        write_readme(readme, tmp_path)


def test_the_readme_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_bytes(README.read_bytes())
    write_readme(copy, RESULTS)
    assert copy.read_bytes() == README.read_bytes()
