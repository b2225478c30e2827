"""Seeded text with structure to learn: a small grammar over invented words. Needs no file and no network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "dr", "gl", "pl", "st", "tr", "sh")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "n", "r", "s", "l", "nd", "rk", "st")
_SENTENCES = (
    "the {adjective} {noun} {verb}s the {noun}.",
    "{name} {verb}s a {noun}, and the {noun} {verb}s {name}.",
    "when the {noun} {verb}s, every {adjective} {noun} {verb}s near {name}.",
    "no {noun} {verb}s without the {adjective} {noun}.",
    "{name} has {number} {noun}s, but {name} has {number}.",
)
_CLASSES = {"noun": 120, "verb": 60, "adjective": 60, "name": 40, "number": 20}


def _words(generator: np.random.Generator) -> dict[str, list[str]]:
    """The vocabulary of one seed: distinct invented words for each class."""
    used: set[str] = set()
    words: dict[str, list[str]] = {}
    for kind, count in _CLASSES.items():
        words[kind] = []
        while len(words[kind]) < count:
            parts = [str(generator.choice(part)) for part in (_ONSETS, _VOWELS, _CODAS, _ONSETS, _VOWELS, _CODAS)]
            word = "".join(parts[: 3 if generator.random() < 0.4 else 6])
            if word not in used:
                used.add(word)
                words[kind].append(word.capitalize() if kind == "name" else word)
    return words


def synthetic_documents(documents: int, seed: int) -> Iterator[str]:
    """Yield `documents` texts of 4 to 24 sentences; each keeps to a few nouns and names, drawn by Zipf's law."""
    generator = np.random.default_rng([seed, 0x5EED])
    words = _words(generator)
    for _ in range(documents):
        # A document has a topic: its own small set of words, so that context helps prediction.
        topic = {kind: [found[(r - 1) % len(found)] for r in generator.zipf(1.3, 5)] for kind, found in words.items()}
        sentences = []
        for _ in range(int(generator.integers(4, 25))):
            sentence = _SENTENCES[int(generator.integers(len(_SENTENCES)))]
            for kind, choices in topic.items():
                while "{" + kind + "}" in sentence:
                    sentence = sentence.replace("{" + kind + "}", choices[int(generator.integers(5))], 1)
            sentences.append(sentence[0].upper() + sentence[1:])
        yield " ".join(sentences)
