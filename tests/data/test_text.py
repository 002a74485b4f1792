import html
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.data.text import decode_text, repair_text


@pytest.mark.parametrize(
    ("seen", "meant"),
    [
        ("PokÃ©mon Moon", "Pokémon Moon"),
        ("Hausbell Â® 250G", "Hausbell ® 250G"),
        ("Donâ€™t Starve â€“ Giant Edition", "Don’t Starve – Giant Edition"),
        ("Sam & Maxâ„¢", "Sam & Max™"),
        ("ÐœÐ¾Ñ\x81ÐºÐ²Ð°", "Москва"),
        ("æ\x97¥æ\x9c¬", "日本"),
        ("KontrolFreekÂ CleanFreekTM", "KontrolFreek CleanFreekTM"),
        ("ï»¿Braid", "Braid"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry&#39;s &quot;Day&quot; &#x2122;", 'Tom & Jerry\'s "Day" ™'),
        ("  one\t two\r\n three ", "one two three"),
    ],
)
def test_repairs(seen: str, meant: str) -> None:
    assert repair_text(seen) == meant


@pytest.mark.parametrize(
    "text",
    ["R&D", "Rock &copy Roll", "CAFÉ® & Bar", "« voilà »", "Amélie", "Æon Flux™", "AT&T;", "日本", "Москва"],
)
def test_leaves_what_may_be_meant(text: str) -> None:
    assert repair_text(text) == text


def test_a_french_quotation_with_a_hard_space_is_no_mojibake() -> None:
    assert repair_text("« voilà\u00a0»") == "« voilà »"


@given(st.text(alphabet=string.ascii_letters + "éèüöñßçÀ’–™®", min_size=1))
def test_mojibake_of_western_titles_is_undone_at_any_depth(text: str) -> None:
    mangled = text.encode().decode("cp1252", errors="strict") if _roundtrips(text) else text
    assert repair_text(mangled) == repair_text(text)


def _roundtrips(text: str) -> bool:
    try:
        text.encode().decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


@given(st.text(alphabet=string.printable))
def test_escaping_is_undone(text: str) -> None:
    plain = repair_text(text)
    assert repair_text(html.escape(plain)) == repair_text(plain)


@given(st.text(alphabet=st.characters(exclude_characters="\ufeff", exclude_categories=["Cs"])))
def test_utf8_is_read_as_it_is(text: str) -> None:
    if text.encode()[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        assert decode_text(text.encode()) == text


def test_a_file_of_two_encodings_is_read_line_by_line() -> None:
    content = "Misérables\r\n".encode() + "Misérables, “Les”\n".encode("cp1252") + b"caf\xe9 \x81\n"
    assert decode_text(content) == "Misérables\r\nMisérables, “Les”\ncafé \x81\n"


def test_byte_order_marks() -> None:
    assert decode_text("user,item".encode("utf-8-sig")) == "user,item"
    assert decode_text("user,é".encode("utf-16")) == "user,é"
