"""Documentation formats -> plain text: HTML, Perl's POD, and the dictionaries of dictd."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# Menus, page headers and permalinks of Sphinx, DocBook and AsciiDoc pages.
_SKIPPED_TAGS = {"head", "script", "style", "nav", "footer", "form", "button"}
_SKIPPED_CLASSES = {"sphinxsidebar", "related", "headerlink", "navheader", "navfooter", "wy-breadcrumbs", "toc"}
_PARAGRAPHS = {"p", "div", "section", "table", "ul", "ol", "dl", "blockquote", "pre", *(f"h{n}" for n in range(1, 7))}
_LINES = {"br", "li", "dt", "dd", "tr"}
_INLINE = ("span", "a", "code", "em", "strong", "b", "i", "tt", "cite", "samp", "var", "kbd", "sub", "sup")


def html_to_text(page: bytes) -> str:
    """The text that a reader of an HTML page sees, without menus; white space is kept inside <pre>."""
    from lxml import etree, html

    tree = html.document_fromstring(page)
    for element in list(tree.iter(*_SKIPPED_TAGS, "a", "div", "ul")):
        if element.tag in _SKIPPED_TAGS or not _SKIPPED_CLASSES.isdisjoint(element.get("class", "").split()):
            element.drop_tree()
    etree.strip_tags(tree, etree.Comment, *_INLINE)  # their text joins what is around it
    parts: list[str] = []
    verbatim = 0

    def add(text: str | None) -> None:
        if text:
            parts.append(text if verbatim else re.sub(r"\s+", " ", text))

    for event, element in etree.iterwalk(tree, events=("start", "end")):
        starts = event == "start"
        if not starts:
            verbatim -= element.tag == "pre"
        if element.tag in _PARAGRAPHS:
            parts.append("\n\n")
        elif element.tag in _LINES:
            parts.append("\n")
        if starts:
            verbatim += element.tag == "pre"
        add(element.text if starts else element.tail)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pod_to_text(pod: str) -> str:
    """Text of a page in Perl's POD, without directives and formatting codes."""
    text = re.sub(r"(?m)^=(over|back|cut|encoding|begin|end|for|pod)\b.*$", "", pod)
    text = re.sub(r"(?m)^=(head\d|item) *", "", text)
    before = None
    while before != text:  # codes nest; the innermost go first
        before = text
        text = re.sub(r"\b[BCFILSXZ]<([^<>\n]*)>", r"\1", text)
    text = text.replace("E<lt>", "<").replace("E<gt>", ">")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def dictionary_entries(compressed: bytes) -> Iterator[bytes]:
    """Entries of a dictd dictionary (.dict.dz); each starts at a line that is not indented, after a blank line."""
    text = zlib.decompress(compressed, wbits=zlib.MAX_WBITS | 16)  # a .dz file is a gzip file
    entries = re.split(rb"\n\n+(?=\S)", text)
    headwords = (n for n, entry in enumerate(entries) if re.match(rb"[A-Za-z'-]+ \\", entry))
    for entry in entries[next(headwords, 0) :]:  # what stands before the first headword describes the file
        yield re.sub(rb"\n[ \t]+", b"\n", entry)
