"""Text as it was meant: bytes in doubtful encodings, mojibake, HTML entities, stray whitespace."""

from __future__ import annotations

import html
import re
from typing import Final

__all__ = ["decode_text", "repair_text"]

_ENTITY: Final = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff\s]+")


def _as_byte(char: str) -> int | None:
    """Return the byte that Windows-1252, or else latin-1, reads as this character."""
    try:
        return char.encode("cp1252")[0]
    except UnicodeEncodeError:
        return ord(char) if ord(char) < 0x100 else None


def _class_of(first: int, last: int) -> str:
    """Write a regex class of every character that stands for a byte in [first, last]."""
    chars = {bytes([byte]).decode("latin-1") for byte in range(first, last + 1)}
    chars |= {bytes([byte]).decode("cp1252", errors="ignore") for byte in range(first, last + 1)}
    return "[" + "".join(re.escape(char) for char in sorted(chars - {""})) + "]"


_TAIL: Final = _class_of(0x80, 0xBF)
_SEQUENCE: Final = (
    f"(?:{_class_of(0xC2, 0xDF)}{_TAIL}|{_class_of(0xE0, 0xEF)}{_TAIL}{{2}}|{_class_of(0xF0, 0xF4)}{_TAIL}{{3}})"
)
# One sequence alone is taken for mojibake where real text has no such pair: Â or Ã and a symbol (accented Latin
# letters), â and € or a neighbour (quotes, dashes, signs), ï» (a byte order mark), ð (emoji). Any other, such as
# the É® of "CAFÉ®" or the é\u00a0» that ends a French quotation, only when it is followed by a second.
_MOJIBAKE: Final = re.compile(
    f"(?:[ÂÃ]{_TAIL}|â{_class_of(0x80, 0x9F)}{_TAIL}|ï»{_TAIL}|ð{_TAIL}{{3}}|{_SEQUENCE}{{2}})(?:{_SEQUENCE})*"
)
_LOST_SPACE: Final = re.compile(r"(?<=[a-z0-9])Â(?= )")


def decode_text(content: bytes) -> str:
    r"""Decode a text file: UTF-8, else line by line UTF-8 where it is valid and Windows-1252 where not.

    Windows-1252 holds all printable characters of latin-1. Bytes it does not know are read as latin-1. Files that
    begin with the byte order mark of UTF-16 are read as that.

    Example:
        >>> decode_text("Misérables\n".encode() + "Café\n".encode("latin-1"))
        'Misérables\nCafé\n'
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "\n".join(_decode_line(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def repair_text(text: str) -> str:
    """Undo what carelessness did to a text: mojibake, HTML entities, control characters, runs of whitespace.

    Only entities that end in a semicolon are read, so ``R&D`` and ``H&Man`` stay. UTF-8 that was read as latin-1
    or Windows-1252 is repaired where the characters cannot be meant; see the rule beside the pattern.

    Example:
        >>> repair_text("PokÃ©mon: Let&amp;#39;s Go")
        "Pokémon: Let's Go"
        >>> repair_text("  CAFÉ® &amp;  Bar ")
        'CAFÉ® & Bar'
    """
    if not text.isascii():
        for _ in range(3):  # mangled more than once
            repaired = _MOJIBAKE.sub(_undo, text)
            if repaired == text:
                break
            text = repaired
        text = _LOST_SPACE.sub("", text)
    if "&" in text:
        for _ in range(3):  # escaped more than once
            unescaped = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
            if unescaped == text:
                break
            text = unescaped
    return _CONTROLS.sub(" ", text).strip()


def _decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return line.decode("cp1252")
        except UnicodeDecodeError:
            return line.decode("latin-1")


def _undo(match: re.Match[str]) -> str:
    found = [byte for char in match.group() if (byte := _as_byte(char)) is not None]
    try:
        return bytes(found).decode("utf-8")
    except UnicodeDecodeError:
        return match.group()
