"""From a clone to a recommendation: what is run, in which order, and the README's sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_contact
from benchmarks.first_contact import (
    CLOSES,
    OPENS,
    README,
    RESULTS,
    ROOT,
    RUN_DIR,
    demo_result,
    measure,
    other_sources,
    pip_settings,
    sentence,
    surroundings,
    write_readme,
)
from pplr.config_files import load_config
from pplr.runtimes.run import Run

MAKEFILE = """
.venv/.installed:
	@mkdir -p .venv && touch $@ && echo installed with "$(PIP_ARGS)" >> ../order

demo: .venv/.installed
	@echo training with cache $$PPLR_CACHE and pip $$PIP_NO_CACHE_DIR >> ../order
	@echo "run folder: runs/demo"
	@sleep 0.3 && echo recommending >> ../order
"""


def content(total: float = 6.25, **more: Any) -> dict[str, Any]:
    minutes = {"clone": 0.05, "install": 2.04, "fetch and train": 4.0, "recommend": 0.16, "total": total}
    machine = {"processor": "a processor", "python": "3.11.7"}
    told = {"minutes": minutes, "machine": machine, "cores": 2, "installed": {"torch": "2.13", "transformers": "5.2"}}
    demo = {"run": {"ndcg@10": 0.0512}, "popularity": {"ndcg@10": 0.0432}, "users": 943}
    return {**told, "other_sources": [], "demo": demo, **more}


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
    path, copy = RESULTS / "first_contact.json", tmp_path / "README.md"
    text = README.read_text(encoding="utf-8")
    told = text.partition(OPENS)[2].partition(CLOSES)[0].strip()
    assert bool(told) == path.exists(), "a sentence and the result that it tells go together"
    assert told == (sentence(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else "")
    copy.write_text(text, encoding="utf-8")
    write_readme(copy, RESULTS)
    assert copy.read_text(encoding="utf-8") == text
    for page in (README, ROOT / "docs" / "index.md", ROOT / "docs" / "quickstart.md", ROOT / "configs/quickstart.yaml"):
        elsewhere = page.read_text(encoding="utf-8").replace(told or OPENS, "")
        assert not re.search(r"\b(in|within) minutes\b|\d minutes\b", elsewhere), f"{page.name} promises a time"


def test_the_sentence_says_where_else_pip_looked_and_what_the_demo_was_worth() -> None:
    plain = sentence(content()).replace("\n", " ")
    assert "nothing cached. Python 3.11.7, torch 2.13, transformers 5.2." in plain
    assert plain.endswith("The demo's ndcg@10 over 943 users is 0.0512, that of popularity 0.0432.")
    both = sentence(content(other_sources=["another index", "packages on disk"])).replace("\n", " ")
    assert "nothing cached, but pip is set up there to look at another index and at packages on disk as well." in both
    versions = {"torch": "2.13.0+cpu", "transformers": "5.2"}
    assert "torch 2.13.0 (its CPU build)," in sentence(content(installed=versions)).replace("\n", " ")


@pytest.mark.parametrize(
    ("settings", "pip_args", "found"),
    [
        ("", "", []),
        ("global.index-url='https://pypi.org/simple/'\nglobal.cert='/etc/own.pem'", "", []),
        (":env:.find-links='/somewhere/wheels'", "", ["packages on disk"]),
        ("global.extra-index-url='\\nfile:///a/simple\\nfile:///b/simple'", "", ["packages on disk"]),
        ("user.index-url='https://index.example.org/simple'", "", ["another index"]),
        (
            "global.find-links='https://example.org/page /own'",
            "",
            ["a page of packages", "packages on disk"],
        ),
        ("", "--extra-index-url https://index.example.org/cpu --quiet", ["another index"]),
        ("", "--find-links=wheels", ["packages on disk"]),
        ("", "-f wheels -i https://index.example.org", ["another index", "packages on disk"]),
    ],
)
def test_where_pip_looks_besides_the_usual_index_is_told_without_a_path_or_a_host(
    settings: str, pip_args: str, found: list[str]
) -> None:
    told = other_sources(settings, pip_args)
    assert told == found
    assert "/" not in sentence(content(other_sources=told))
    assert "example" not in sentence(content(other_sources=told))


def test_pip_says_how_it_is_set_up_here(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nextra-index-url =\n    file:///a/simple\n    https://index.example.org\n")
    kept = {name: value for name, value in surroundings(tmp_path).items() if not name.startswith("PIP_")}
    own = {"PIP_CONFIG_FILE": str(file)}
    assert set(other_sources(pip_settings(Path(sys.executable), kept | own))) >= {"another index", "packages on disk"}
    own = {"PIP_CONFIG_FILE": os.devnull}  # pip then reads no file at all
    assert other_sources(pip_settings(Path(sys.executable), kept | own)) == []
    own["PIP_FIND_LINKS"] = str(tmp_path)
    assert other_sources(pip_settings(Path(sys.executable), kept | own)) == ["packages on disk"]


def test_what_the_demo_is_worth_is_that_of_its_run_folder(finished: Callable[..., Run]) -> None:
    run = finished("evaluation.cutoffs=[5, 10]", "evaluation.floors=[popularity]")
    told = demo_result(run.folder)
    assert run.metrics is not None
    assert told["run"]["ndcg@10"] == run.metrics["overall"]["ndcg@10"]
    assert told["popularity"]["ndcg@10"] == run.metrics["floors"]["popularity"]["ndcg@10"]
    assert told["users"] == len(run.evaluation().users)
    demo = load_config(ROOT / "configs" / "quickstart.yaml").evaluation
    assert 10 in demo.cutoffs
    assert "popularity" in demo.floors
    assert f"RUN_DIR ?= {RUN_DIR}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
