"""The site builds without a warning, holds all that is generated, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import pplr
from pplr.config import Config
from tests.docs.checks import PPLR
from tests.docs.pages import DOCS, ROOT

pytest.importorskip("furo")
pytest.importorskip("myst_parser")
pytestmark = pytest.mark.slow

LOADING = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "use": "href"}


class Page(HTMLParser):
    """What a page loads, the places in it that can be linked to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places.add(given.get("id") or "")
        if tag in LOADING and given.get("rel") not in ("canonical", "search", "index"):
            self.loads.append(given.get(LOADING[tag]) or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with a network that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"python (-m sphinx .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    words = [str(folder / "html") if word == "build/docs" else word for word in line.split()]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    told = subprocess.run(
        [sys.executable, *words, "-d", str(folder / "doctrees")],
        cwd=ROOT,
        env=os.environ | nowhere | {"PYTHONPATH": str(Path(pplr.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert not told.stderr
    return folder / "html"


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in re.findall(r'href="([^"#:]+\.html)', page.read_text(encoding="utf-8")):
            waiting.append((page.parent / target).resolve())
    assert {path.resolve() for path in site.rglob("*.html")} <= {path.resolve() for path in reached}
    for source in DOCS.rglob("*.md"):
        if not source.parent.name.endswith("_text") and source.parent.name != "included":
            assert (site / source.relative_to(DOCS)).with_suffix(".html").exists()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loads = Page(path).loads
        assert loads
        for target in loads:
            assert not re.match(r"(\w+:)?//", target), f"{path.name} loads {target}"
            if not target.startswith("data:"):
                assert (path.parent / target.split("?")[0].split("#")[0]).exists(), f"{path.name} lacks {target}"
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*['\"]?(\w+:)?//", path.read_text(encoding="utf-8")), path.name


def test_every_command_has_a_page_with_every_option(site: Path) -> None:
    def below(words: tuple[str, ...], command: object) -> None:
        for name, own in getattr(command, "commands", {}).items():
            below((*words, name), own)
        if not hasattr(command, "commands"):
            page = Page(site / "generated" / "commands" / f"{'-'.join(words)}.html")
            for option in command.params:
                for flag in option.opts if option.param_type_name == "option" and option.name != "help" else ():
                    assert flag in page.text
            assert command.help
            assert plain(command.help) in plain(page.text)

    below((), PPLR)


def test_every_field_of_the_configuration_has_a_place(site: Path) -> None:
    page = Page(site / "reference" / "config.html")
    text = plain(page.text)

    def below(section: type, prefix: str) -> int:
        count = 0
        for name, field in section.model_fields.items():
            kinds = [field.annotation, *(getattr(field.annotation, "__args__", ()) if name != "by_client" else ())]
            inner = [kind for kind in kinds if hasattr(kind, "model_fields")]
            if inner:
                count += below(inner[0], f"{prefix}{name}.")
            else:
                assert f"confval-{prefix}{name}" in page.places, f"{prefix}{name}"
                assert plain(field.description) in text
                count += 1
        return count

    assert below(Config, "") > 100


def test_every_public_name_has_a_place(site: Path) -> None:
    modules = Page(site / "generated" / "modules" / "pplr.html").text
    for name in pplr.__all__:
        assert name == "__version__" or f"pplr.{name}" in modules
    federation = Page(site / "generated" / "modules" / "pplr.federation.html")
    assert {"pplr.federation.heating.heating_weight", "pplr.federation.aggregation.mix"} <= federation.places
    assert "Zhao et al. 2024" in federation.text


def test_every_reference_has_a_place(site: Path) -> None:
    page = Page(site / "bibliography.html")
    keys = re.findall(r"@\w+\{(\w+),", (DOCS / "references.bib").read_text(encoding="utf-8"))
    assert {f"bib-{key}" for key in keys} <= page.places
    assert "Blaise Agüera y Arcas" not in page.text  # the fifth of five: the first three are named
    assert "Martín Abadi" in page.text


def test_names_between_backticks_lead_to_their_reference(site: Path) -> None:
    heating = (site / "concepts" / "heating.html").read_text(encoding="utf-8")
    assert 'href="../reference/config.html#confval-federation.heating_scale"' in heating
    assert 'href="generated/commands/report.html"' in (site / "quickstart.html").read_text(encoding="utf-8")
    assert 'href="bibliography.html#bib-chen2024hllm"' in (site / "method.html").read_text(encoding="utf-8")
