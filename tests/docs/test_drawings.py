"""Drawings say in words what they show, stand alone, and are legible on white and on black."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pplr.federation.heating import heating_weight
from tests.docs.pages import DOCS, PAGES

DRAWINGS = sorted((DOCS / "drawings").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_complete(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    named = {child.get("id"): (child.text or "") for child in root if child.tag in (f"{SVG}title", f"{SVG}desc")}
    assert len(named["title"]) > 5
    assert len(named["desc"]) > 80
    assert not re.search(r"href=|url\((?!#)|@import|<script|<image", text)
    assert any(f"drawings/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_legible_in_light_and_dark_without_colour(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", own)) for own in re.findall(r"svg \{([^}]*)\}", text)]
    assert len(schemes) == 2, "one for light and one for dark"
    assert "prefers-color-scheme: dark" in text
    for scheme in schemes:
        for ground in ("paper", "fill", "far"):
            assert contrast(scheme["ink"], scheme[ground]) >= 7
            assert contrast(scheme["soft"], scheme[ground]) >= 4.5
    rest = re.sub(r"svg \{[^}]*\}", "", text)
    used = set(re.findall(r"\b(?:fill|stroke)(?:: |=\")([^;\"]+)", rest))
    assert used <= {"none", *(f"var(--{name})" for name in schemes[0])}


def test_the_curves_of_heating_are_the_formula() -> None:
    root = ET.fromstring((DOCS / "drawings" / "heating.svg").read_text(encoding="utf-8"))
    curves = [own.get("points", "") for own in root.iter(f"{SVG}polyline")]
    for points, server_round in zip(curves, (0, 1, 4), strict=True):
        for point in points.split():
            x, y = map(float, point.split(","))
            share, weight = (x - 70) / 490, 0.5 + 0.5 * (310 - y) / 270  # the axes' ends
            drawn = heating_weight(share, server_round, heating_scale=0.7, heating_horizon=5)
            assert weight == pytest.approx(drawn, abs=2e-3)
