"""The page at `/` in a real browser: it completes a text, colours its tokens by depth, and says what went wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from tests.helpers.browser import chromium, tab
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.model.inference.test_serve import running

pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium here, which .ci/run installs where it can")

SPANS = "[...document.querySelectorAll('#answer span')]"


async def visit(address: str, picture: Path) -> tuple[list[tuple[str, str, str]], str, str]:
    async with tab(address) as page:
        await page.evaluate("document.getElementById('prompt').value = 'hello there'")
        await page.evaluate("document.getElementById('tokens').value = 12")
        await page.evaluate("document.querySelector('button').click()")
        await page.until(f"{SPANS}.length > 11")
        spans = await page.evaluate(f"{SPANS}.map(s => [s.textContent, s.title, s.style.background])")
        legend = await page.evaluate("document.getElementById('legend').textContent")
        await page.screenshot(picture)
        await page.evaluate("document.getElementById('depth').value = 'cap:9'")
        await page.evaluate("document.querySelector('button').click()")
        await page.until("document.getElementById('error').textContent !== ''")
        error = await page.evaluate("document.getElementById('error').textContent")
        return [tuple(span) for span in spans], legend, error


@pytest.mark.slow
def test_the_page_completes_a_text_and_colours_it(tmp_path: Path) -> None:
    with running() as (address, _):
        spans, legend, error = asyncio.run(visit(address, tmp_path / "page.png"))
    prompt = tiny_tokenizer().encode("hello there").ids
    engine = Engine(tiny_model("expert-recursion_wise", 1))
    request = engine.generate([prompt], SamplingParams(max_tokens=12, stop=[[0]]))[0]
    shown = [tiny_tokenizer().id_to_token(token) for token in request.text]
    assert [text for text, _, _ in spans] == shown[: len(spans)] and len(spans) >= len(prompt) + len(request.tokens)
    for (_, title, colour), depth in zip(spans, request.depths):
        assert title.startswith(f"{depth} recursion") and colour.startswith("rgb")
    assert len({colour for _, _, colour in spans[: len(request.depths)]}) == len(set(request.depths)) > 1
    assert all(str(depth) in legend for depth in request.depths) and "FLOPs" in legend
    assert "depth" in error and "does not fit" in error
    assert (tmp_path / "page.png").stat().st_size > 5000
