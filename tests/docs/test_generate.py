"""What pages are made from the code by: types in words, BibTeX, docstrings, and files that stay as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from _generate import write_pages
from _generate.bibliography import bibliography_page, entries, short_name
from _generate.commands import all_commands, command_pages
from _generate.docstrings import after_napoleon, before_napoleon
from _generate.fields import all_fields, fields_page
from _generate.leakage import leakage_table
from _generate.links import move_links
from _generate.modules import public_modules
from pydantic import BaseModel

from tests.docs.pages import DOCS, ROOT

BOOK = (
    '@book{roe2020ash, author = {Roe, J{\\"o}rg and Doe, Ann and {de la Cruz}, Luz}, title = {On {Ash}}, year = {2020}}'
)
WORDS = {
    "training.learning_rate": ("number above 0", "0.0001"),
    "training.samples": ("whole number at least 1, or `null`", "null"),
    "data.holdout.ratios": ("list of 3 numbers", "[8.0, 1.0, 1.0]"),
    "evaluation.cutoffs": ("list of whole numbers, each at least 1; at least 1 of them", "[10, 20]"),
    "adapter.target_modules": ("list of texts; at least 1 of them", '["q_proj", "v_proj"]'),
    "cut.by_client": ("mapping from names to `ClientCutConfig`", "{}"),
    "adapter.kind": ("one of `lora`, `full`", '"lora"'),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_field_is_told_in_words(name: str) -> None:
    kind, default = WORDS[name]
    assert f":::{{confval}} {name}\n:type: {kind}\n:default: `{default}`\n" in fields_page()


def test_every_field_has_a_sentence() -> None:
    assert all(field.description for field in all_fields().values())


def test_a_type_that_has_no_words_is_refused() -> None:
    class Odd(BaseModel):
        value: complex = 1j

    with pytest.raises(KeyError):
        fields_page(Odd)


def test_bibtex_is_read() -> None:
    found = entries(BOOK)
    authors = "Roe, Jörg and Doe, Ann and de la Cruz, Luz"
    assert found == {"roe2020ash": {"kind": "book", "author": authors, "title": "On Ash", "year": "2020"}}
    assert short_name(found["roe2020ash"]) == "Roe et al. 2020"
    assert bibliography_page(BOOK) == (
        "(bib-roe2020ash)=\n\nJörg Roe, Ann Doe, Luz de la Cruz: **On Ash**. 2020. `roe2020ash`\n"
    )


@pytest.mark.parametrize("text", [BOOK[:-1], BOOK[:-1] + "\n" + BOOK.replace("ash", "elm"), BOOK + "\n" + BOOK])
def test_bibtex_that_is_not_closed_or_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"references\.bib"):
        entries(text)


def test_a_docstring_links_what_it_cites_and_keeps_an_attributes_colons() -> None:
    app = SimpleNamespace(srcdir=DOCS)
    lines = ["Mix.", "", "Cites:", "    zhao2024pplr", "    li2021ditto", ""]
    before_napoleon(app, "function", "f", None, None, lines)
    assert lines[3:] == [
        "    | :ref:`Zhao et al. 2024 <bib-zhao2024pplr>`",
        "    | :ref:`Li et al. 2021 <bib-li2021ditto>`",
        "",
    ]
    lines = ["Names: those who train."]
    before_napoleon(app, "attribute", "a", None, None, lines)
    assert ":" not in lines[0]
    after_napoleon(app, "attribute", "a", None, None, lines)
    assert lines == ["Names: those who train."]


def test_links_of_the_readme_lead_on_from_a_page_in_docs(tmp_path: Path) -> None:
    app = SimpleNamespace(srcdir=tmp_path)
    links = (
        "[a](docs/a.md#b) [c](CONTRIBUTING.md) [e](examples/README.md) [p](examples/a.py) [w](https://x.org) [h](#b)"
    )
    content = [links]
    move_links(app, Path("../README.md"), "quickstart", content)
    assert content == ["[a](a.md#b) c e [p](../examples/a.py) [w](https://x.org) [h](#b)"]
    for name in ("contributing", "examples"):
        (tmp_path / f"{name}.md").touch()
    content = [links]
    move_links(app, Path("../README.md"), "quickstart", content)
    assert content[0].startswith("[a](a.md#b) [c](contributing.md) [e](examples.md) [p]")
    content = [links]
    move_links(app, Path("generated/included/fields.md"), "config", content)
    assert content == [links]


def test_every_command_and_every_layer_has_a_page() -> None:
    pages = command_pages()
    assert len(pages) == len(list(all_commands())) > 20
    assert "`--input-layers INTEGER`\n: Blocks after the embeddings that the client holds. Needed." in pages["cut"]
    assert "Default: `10000`. At least 1." in pages["compare"]
    assert {"pplr.errors", "pplr.federation.heating", "pplr.runtimes.run"} <= set(public_modules())


def test_leakage_is_that_of_the_strongest_attack() -> None:
    rows = leakage_table(ROOT / "results" / "privacy").splitlines()
    assert "| `item_vectors` | 8 | 1 | 11 | 1.00 | 1.00 | 0.15 | 8 | 3 |" in rows
    assert not [row for row in rows if "| 28 | 1 | 30 |" in row]  # no attacker there has the adapter


def test_pages_are_written_once_and_removed_with_what_they_were_made_from(tmp_path: Path) -> None:
    (tmp_path / "docs" / "generated").mkdir(parents=True)
    (tmp_path / "docs" / "references.bib").write_text(BOOK)
    (tmp_path / "results" / "privacy").mkdir(parents=True)
    old = tmp_path / "docs" / "generated" / "old.md"
    old.write_text("?")
    write_pages(tmp_path / "docs")
    assert not old.exists()
    page = tmp_path / "docs" / "generated" / "commands" / "train.md"
    before = page.stat().st_mtime_ns
    write_pages(tmp_path / "docs")
    assert page.stat().st_mtime_ns == before
