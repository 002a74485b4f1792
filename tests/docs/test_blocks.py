"""Every block on every page is run, parsed by what it is for, or generated; a kind that nobody checks fails."""

from __future__ import annotations

import configparser
import doctest
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml
from pydantic import ValidationError

from pplr.config import Config
from pplr.errors import PplrError
from tests.docs.checks import check_command, check_span
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands, spans

BLOCKS = [block for page in PAGES for block in blocks(page)]
REFUSED = (
    AssertionError,
    FileNotFoundError,
    ModuleNotFoundError,
    PplrError,
    SystemExit,
    ValidationError,
    click.UsageError,
)
CARRIED_OUT = {
    "README.md": ("tests/test_readme.py", "tests/docs/test_carried_out.py"),
    "docs/deploy.md": ("tests/end_to_end/test_deploy_page.py", "tests/end_to_end/test_containers.py"),
    "docs/dp.md": ("tests/docs/test_carried_out.py",),
    "docs/howto/audit.md": ("tests/docs/test_howto.py",),
    "docs/howto/choose_a_cut.md": ("tests/docs/test_howto.py",),
    "docs/howto/own_data.md": ("tests/docs/test_howto.py",),
    "docs/howto/own_model.md": ("tests/docs/test_howto.py",),
    "docs/howto/resume.md": ("tests/docs/test_howto.py",),
    "docs/privacy.md": ("tests/docs/test_carried_out.py",),
    "docs/report.md": ("tests/docs/test_carried_out.py",),
    "docs/runtimes.md": ("tests/docs/test_carried_out.py", "tests/end_to_end/test_flower_simulation.py"),
    "docs/trackers.md": ("tests/docs/test_carried_out.py",),
    "docs/web.md": ("tests/apps/web/test_command.py",),
}
"""Pages with commands of `pplr` or of compose, and the tests that carry them out."""
PARSED_ALONE = {"pip", "python", "make", "tensorboard", "mlflow"}
"""Programs whose commands nobody runs: CONTRIBUTING.md says why."""
RUN_ELSEWHERE = {"README.md": "tests/test_readme.py"}
"""Pages whose Python is run by a test of their own, which looks at what it prints."""
NO_EXTRA_BRINGS = {"mlflow ui": "mlflow"}
"""Commands of packages that no extra installs, so the block that has one must: mlflow-skinny has no server."""


def check_sh(block: Block) -> None:
    found = commands(block)
    assert found, "a block without a command"
    for words in found:
        check_command(words)
        called = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if package := NO_EXTRA_BRINGS.get(" ".join(called[:2])):
            installed = {word for own in found if own[:2] == ["pip", "install"] for word in own[2:]}
            assert package in installed, f"nobody installs {package}"


def check_yaml(block: Block) -> None:
    Config.model_validate(yaml.safe_load(block.text))


def check_python(block: Block) -> None:
    compile(block.text, str(block), "exec")
    assert block.page.name in RUN_ELSEWHERE, "Python is written as a session (pycon), which is run"


def check_session(block: Block) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line)
    assert test.examples
    told: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert result.failed == 0, "".join(told)


def check_unit(block: Block) -> None:
    """A service of systemd: sections, and a command that exists."""
    unit = configparser.ConfigParser()
    unit.read_string(block.text)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    check_command([Path(program).name, *words])


def check_text(block: Block) -> None:
    """Formulas, drawings and what a program printed: no command hides in it."""
    assert not re.search(r"^\s*(\$|>>>|pplr|python|make|pip|docker|git) ", block.text, flags=re.MULTILINE)


KINDS: dict[str, Callable[[Block], None]] = {
    "sh": check_sh,
    "yaml": check_yaml,
    "python": check_python,
    "pycon": check_session,
    "ini": check_unit,
    "text": check_text,
}
BUILT = {"{include}", "{literalinclude}", "{toctree}"}
"""Directives, which the build of the site carries out."""


def check(block: Block) -> None:
    assert block.kind in KINDS or block.kind in BUILT, f"nobody checks blocks of kind {block.kind!r}"
    if block.kind in KINDS:
        KINDS[block.kind](block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_what_it_says(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPLR_KIT", raising=False)
    check(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_between_backticks_is_there(page: Path) -> None:
    for span in spans(page):
        check_span(span)


def test_every_page_with_a_command_has_a_test_that_carries_it_out() -> None:
    found = {
        str(block.page.relative_to(ROOT))
        for block in BLOCKS
        if block.kind == "sh" and not {program(words) for words in commands(block)} <= PARSED_ALONE
    }
    assert found == set(CARRIED_OUT)
    for page, tests in CARRIED_OUT.items():
        for test in tests:
            assert reads(test, page), f"{test} does not read {page}"


def program(words: list[str]) -> str:
    return next(word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word))


def reads(test: str, page: str) -> bool:
    """Whether a test names a page, itself or by the constant of tests/end_to_end/walk.py."""
    text = (ROOT / test).read_text(encoding="utf-8")
    return f'"{Path(page).name}"' in text or (page == "docs/deploy.md" and "import PAGE" in text)


def test_python_that_is_run_elsewhere_is_run() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("", "anything"),
        ("bash", "pplr doctor"),
        ("indented", "pplr doctor"),
        ("sh", "pplr trian CONFIG"),
        ("sh", "pplr train CONFIG --reusme"),
        ("sh", "pplr train CONFIG --set training.rate=1"),
        ("sh", "pplr recommend"),
        ("sh", "pplr server --federation f --state s --listen a:1 -- --nothing"),
        ("sh", "python -m benchmarks.nothing"),
        ("sh", "python -m benchmarks.audit CONFIG --name x --nothing"),
        ("sh", "python -m benchmarks.clients --nothing"),
        ("sh", "make nothing"),
        ("sh", "pip install 'pplr[nothing]'"),
        ("sh", "curl https://example.org"),
        ("sh", "docker run x"),
        ("sh", "docker compose run nobody train"),
        ("sh", "docker compose run authority trian"),
        ("sh", "HERE=1 nothing"),
        ("sh", "pip install 'pplr[mlflow]'\nHERE=1 mlflow ui"),
        ("yaml", "training: {rate: 1}"),
        ("python", "import pplr"),
        ("pycon", ">>> 1 + 1\n3\n"),
        ("ini", "[Service]\nExecStart=/bin/pplr serve"),
        ("text", "$ pplr doctor"),
    ],
)
def test_the_check_refuses(kind: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(REFUSED):
        check(Block(ROOT / "docs" / "page.md", 1, kind, text))


@pytest.mark.parametrize(
    "span", ["pplr trian", "pplr train --reusme", "training.rate", "docs/nothing.md", "make nothing"]
)
def test_the_check_of_names_refuses(span: str) -> None:
    with pytest.raises(AssertionError):
        check_span(span)
