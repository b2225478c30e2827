"""Pictures of text of any script: a font that has each character, or a sign and a word."""

from __future__ import annotations

import warnings

import numpy as np

from pretrain.report import fonts
from pretrain.report.fonts import NO_GLYPH, families_for, note_on
from pretrain.views import Routed, heat_map


def test_families_cover_what_is_there_and_name_what_is_not(monkeypatch) -> None:
    assert families_for(["state", "é ↵ · □"]) == (["DejaVu Sans Mono"], [])
    tables = {"DejaVu Sans Mono": frozenset(map(ord, "abc")), "Noto Sans CJK SC": frozenset(map(ord, "中文"))}
    monkeypatch.setattr(fonts, "_covered", lambda family: tables.get(family, frozenset()))
    assert families_for(["ab中", "😀😀"]) == (["DejaVu Sans Mono", "Noto Sans CJK SC"], ["😀"])
    assert note_on([]) == "" and "U+1F600" in note_on(["😀"]) and NO_GLYPH in note_on(["😀"])


def test_a_heat_map_of_any_script_is_drawn_without_a_warning() -> None:
    parts = ["the ", "中文", "😀", "naïve", "\U000f0000"]
    depth = np.array([[0, 1, 2, 1, 0]])
    figure = heat_map(parts, Routed(np.arange(5)[None], depth, np.full((1, 5, 2), np.nan), depth))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert len(shown) == sum(map(len, parts)) and shown[-1] == NO_GLYPH
