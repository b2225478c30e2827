"""Fonts for text of any script in pictures: those installed that have its characters, and a word where none has."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from matplotlib import font_manager

# In order of preference; the first is matplotlib's own and always there.
FAMILIES = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei",
            "IPAGothic", "Noto Emoji", "Symbola", "Unifont", "DejaVu Sans")  # fmt: skip
NO_GLYPH = "□"


@functools.cache
def _covered(family: str) -> frozenset[int]:
    """Code points of a family; none where it is not installed."""
    try:
        path = font_manager.findfont(family, fallback_to_default=False)
    except ValueError:
        return frozenset()
    return frozenset(font_manager.get_font(path).get_charmap())


def families_for(text: Iterable[str]) -> tuple[list[str], list[str]]:
    """Families to set a text in, each for what those before it lack; and the characters that none of them has."""
    left = {ord(character) for part in text for character in part}
    chosen = [FAMILIES[0]]
    for family in FAMILIES:
        found = left & _covered(family)
        if found and family not in chosen:
            chosen.append(family)
        left -= found
    return chosen, [chr(point) for point in sorted(left)]


def note_on(missing: list[str]) -> str:
    """What to say under a picture that could not show some characters; empty where it could."""
    if not missing:
        return ""
    points = ", ".join(f"U+{ord(character):04X}" for character in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return f" {NO_GLYPH} stands for {points}{more}, which no font here has: install fonts-noto-cjk or fonts-symbola."
