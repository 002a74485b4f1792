"""The bibliography, from ``docs/references.bib``."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["bibliography_page", "entries", "short_name"]

_ACCENTS = {'"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", "c": "\u0327"}
_ACCENT = re.compile(r"\\([\"'`^~c])\s*\{?(\w)\}?")


def entries(text: str) -> dict[str, dict[str, str]]:
    """Read BibTeX: the fields of each entry by its key, without braces and with accents as letters.

    Raises:
        ValueError: An entry is not closed, or a key comes twice.
    """
    found: dict[str, dict[str, str]] = {}
    for start in re.finditer(r"^@(\w+)\{([\w:-]+),", text, flags=re.MULTILINE):
        kind, key = start.groups()
        body = _closed(text, start.end(), key)
        if key in found:
            raise ValueError(f"references.bib has {key} twice")
        found[key] = {"kind": kind}
        for field in re.finditer(r"(\w+)\s*=\s*\{", body):
            found[key][field[1]] = _letters(_closed(body, field.end(), f"{key}.{field[1]}"))
    return found


def _closed(text: str, start: int, what: str) -> str:
    """Return what stands between a brace that was opened and the one that closes it."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
        if text[place] == "@" and text[place - 1] == "\n":
            break
    raise ValueError(f"references.bib: {what} is not closed")


def _letters(value: str) -> str:
    accented = _ACCENT.sub(lambda own: unicodedata.normalize("NFC", own[2] + _ACCENTS[own[1]]), value)
    return " ".join(accented.replace("{", "").replace("}", "").replace("--", "–").split())


def _authors(entry: dict[str, str]) -> list[str]:
    """Turn ``Surname, Given and ...`` into ``Given Surname``."""
    names = [name.split(", ", 1) for name in entry["author"].split(" and ")]
    return [" ".join(reversed(name)) for name in names]


def _surname(entry: dict[str, str]) -> str:
    return entry["author"].split(" and ")[0].split(",")[0]


def short_name(entry: dict[str, str]) -> str:
    """Name an entry as in running text: Zhao et al. 2024."""
    surnames = [name.split(",")[0] for name in entry["author"].split(" and ")]
    who = (
        surnames[0] if len(surnames) == 1 else " and ".join(surnames) if len(surnames) == 2 else f"{surnames[0]} et al."
    )
    return f"{who} {entry['year']}"


def bibliography_page(text: str) -> str:
    """Write a paragraph for each entry, by surname and year, each a place that can be linked to."""
    found = sorted(entries(text).items(), key=lambda own: (_surname(own[1]).lower(), own[1]["year"], own[0]))
    return "\n\n".join(f"(bib-{key})=\n\n{_paragraph(entry)} `{key}`" for key, entry in found) + "\n"


def _paragraph(entry: dict[str, str]) -> str:
    names = _authors(entry)
    who = ", ".join(names if len(names) <= 4 else [*names[:3], "and others"])
    where = next((entry[name] for name in ("journal", "booktitle", "howpublished") if name in entry), "")
    where += f" {entry['volume']}" if "volume" in entry else ""
    where += f" ({entry['number']})" if "number" in entry else ""
    where += f", pages {entry['pages']}" if "pages" in entry else ""
    link = ""
    if "eprint" in entry:
        link = f" [arXiv {entry['eprint']}](https://arxiv.org/abs/{entry['eprint']})."
    elif "doi" in entry:
        link = f" [doi:{entry['doi']}](https://doi.org/{entry['doi']})."
    return f"{who}: **{entry['title']}**. {f'*{where}*, ' if where else ''}{entry['year']}.{link}"
