"""Views: scores stand at the tokens they belong to, classes and shares add up, the command writes what it names."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from data_prep.settings import UserError
from pretrain.token_depths import CLASSES, classify
from pretrain.views import (
    Routed,
    heat_map,
    main,
    route,
    score_histograms,
    shares,
    stacked,
    token_html,
)
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import settings_for, train
from tests.helpers.tiny import VOCABULARY, tiny_model


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ["expert-recursion_wise", "expert-shared", "expert-aux-shared_update"])
@pytest.mark.parametrize("mode", ["causal", "topk"])
def test_expert_scores_stand_where_tokens_were_offered(variant, mode) -> None:
    model, ids = tiny_model(variant), ids_of(2, 24)
    documents = torch.arange(24).expand(2, -1) // 9 if mode == "topk" else None
    routed = route(model, ids, documents, mode)
    offered = routed.depth[..., None] >= np.arange(3)
    assert (np.isnan(routed.scores) == ~offered).all()
    assert (routed.scores[offered] >= 0).all() and (routed.scores[offered] <= 1).all()
    if mode == "causal" and "aux" not in variant:  # recursion 1 takes all; after it a score of at least 0.5 enters
        entered = routed.depth[..., None] > np.arange(3)
        deeper, decided = offered[..., 1:], routed.scores[..., 1:] >= 0.5
        assert (decided[deeper] == entered[..., 1:][deeper]).all()
        assert 0 < entered[..., 1].mean() < 1


def test_scores_do_not_depend_on_what_else_is_in_the_batch() -> None:
    model, ids = tiny_model("expert-recursion_wise"), ids_of(3, 16)
    together = route(model, ids, None, "causal")
    for row in range(3):
        alone = route(model, ids[row : row + 1], None, "causal")
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-6)


@pytest.mark.parametrize("variant", ["exit", "exit-state", "exit-latent"])
def test_exits_show_the_confidence_of_those_they_asked(variant) -> None:
    model = tiny_model(variant, 1)
    routed = route(model, torch.arange(1, 25).view(2, 12), None, "causal")
    asked = routed.depth[..., None] >= np.arange(3)
    assert np.array_equal(np.isnan(routed.scores), ~asked)
    assert np.nanmin(routed.scores) >= 0 and np.nanmax(routed.scores) <= 1


def test_token_choice_scores_are_probabilities_of_depths() -> None:
    routed = route(tiny_model("token-shared"), ids_of(2, 16), None, "causal")
    np.testing.assert_allclose(routed.scores.sum(-1), 1.0, atol=1e-5)
    assert (routed.scores.argmax(-1) + 1 == routed.depth).all()


@pytest.mark.parametrize(
    ("piece", "before", "is_end", "expected"),
    [
        (" the", "x", False, "word start"),
        ("The", "", False, "word start"),
        ("The", "\n", False, "word start"),
        ("ing", " the", False, "word continuation"),
        (" 1987", "x", False, "digit"),
        (".\n", "x", False, "punctuation"),
        (" ", "x", False, "whitespace"),
        ("\ufffd", "x", False, "part of a character"),
        ("", "x", False, "part of a character"),
        ("<|endoftext|>", "x", True, "end of text"),
    ],
)
def test_classes(piece, before, is_end, expected) -> None:
    assert classify(piece, before, is_end) == expected
    assert expected in CLASSES


def test_shares() -> None:
    np.testing.assert_allclose(shares(np.array([[0, 1], [1, 3]]), 3), [0.25, 0.5, 0, 0.25])


def routed_by_hand() -> Routed:
    scores = np.array([[[0.9, 0.2, np.nan], [0.8, 0.7, 0.6], [0.7, 0.1, np.nan]]])
    depth = np.array([[1, 3, 1]])
    return Routed(np.array([[5, 6, 7]]), depth, scores, depth[..., None] > np.arange(3))


def test_the_page_escapes_text_and_tells_depth_and_scores_on_hover() -> None:
    page = token_html(["<b>", " &", "x\n"], routed_by_hand())
    assert "<b>" not in page and "&lt;b&gt;" in page and " &amp;" in page
    assert 'title="position 0, token 5: depth 1, scores 0.900, 0.200"' in page
    colours = re.findall(r'scores [^"]*" style="background:(#\w+)"', page)
    assert colours[0] == colours[2] != colours[1]


def test_the_heat_map_has_a_box_per_token_and_breaks_lines() -> None:
    axes = heat_map(["a$b", " c", "x\n"], routed_by_hand()).axes[0]
    assert [(box.get_x(), box.get_y(), box.get_width()) for box in axes.patches] == [(0, 0, 3), (3, 0, 2), (5, 0, 2)]
    long = Routed(np.zeros((1, 90), int), np.ones((1, 90), int), np.full((1, 90, 3), 0.5), np.ones((1, 90, 3), bool))
    boxes = heat_map(["word\n"] * 90, long).axes[0].patches
    assert len(boxes) == 60  # the rest is in the HTML


@pytest.mark.parametrize("gates", [1, 3, 4, 7])
def test_labels_can_be_read_on_a_page(gates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,100 pixels, as wide as a page is and no picture is shown wider: no letter is under 9 of them high."""
    monkeypatch.setattr("pretrain.views.gates_of", lambda _: gates)
    depth = np.arange(8)[None] % (gates + 1)
    routed = Routed(depth, depth, np.full((1, 8, gates), 0.5), depth[..., None] > np.arange(gates))
    names = [f"{name}\n1,234,567" for name in CLASSES]
    scores = score_histograms(routed, tiny_model("expert-shared").config)
    assert len(scores.axes) == gates
    for figure in (scores, stacked(names, np.full((len(names), gates + 1), 0.5), "class")):
        figure.canvas.draw()
        shown = min(1.0, 1068 / (figure.get_figwidth() * 130))
        for axes in figure.axes:
            ticks = [text for text in axes.get_xticklabels() if text.get_text()]
            legend = axes.get_legend()
            texts = [*ticks, axes.xaxis.label, axes.title, *(legend.get_texts() if legend else ())]
            assert min(text.get_fontsize() for text in texts) * 130 / 72 * shown >= 9
            boxes = [text.get_window_extent() for text in ticks]
            assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "labels run into each other"


def test_score_histograms_tell_who_entered() -> None:
    figure = score_histograms(routed_by_hand(), tiny_model("expert-shared").config)
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [
        ["left out (0)", "entered (3)"],
        ["left out (2)", "entered (1)"],
        ["left out (0)", "entered (1)"],
    ]


@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("variant", ["mod", "mod-predictor", "ut", "ut-basic", "ut-frozen", "expert-propagated"])
def test_every_way_of_spending_depth_can_be_looked_at(variant, mode) -> None:
    """Depths in 0 .. G, scores at the tokens that gates judged, pictures that count who passed each."""
    model, ids = tiny_model(variant), ids_of(2, 20)
    routed = route(model, ids, None, mode)
    gates = routed.scores.shape[-1]
    assert routed.passed.shape == routed.scores.shape and gates == model.model.depth.gates
    assert routed.depth.min() >= 0 and routed.depth.max() <= gates and len(np.unique(routed.depth)) > 1
    known = ~np.isnan(routed.scores)
    assert known[..., 0].all() and (routed.scores[known] >= 0).all() and (routed.scores[known] <= 1).all()
    assert known[routed.passed].all()
    if variant == "mod" and mode == "causal":  # gates of the middle know no nesting
        assert (routed.passed == (routed.scores >= 0.5)).all() and known.all()
    counted = [axes.get_legend().get_texts()[1].get_text() for axes in score_histograms(routed, model.config).axes]
    assert counted == [f"entered ({count})" for count in routed.passed.sum((0, 1))]
    parts = ["a"] * 20
    assert heat_map(parts, routed).axes and "recursions executed" in token_html(parts, routed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_tiny(folder)
    shutil.copytree(folder, folder.with_name("more"))
    return folder


@pytest.mark.parametrize("architecture", ["mor_expert", "mor_token", "mod", "ut", "early_exit"])
def test_the_command_writes_page_pictures_and_figures(data, tmp_path, architecture) -> None:
    run, output, text = tmp_path / "run", tmp_path / "views", tmp_path / "text.txt"
    train(settings_for(run, data, architecture))
    text.write_text("No lound moufests <i>without</i> the gest.\n" * 9)
    options = [
        "--text",
        str(text),
        "--output",
        str(output),
        "--data",
        str(data),
        str(data.with_name("more")),
        "--sequences",
        "3",
    ]
    assert main(["--checkpoint", str(run), *options]) == 0
    results = json.loads((output / "results.json").read_text())
    assert len(results["tokens"]) == len(results["depth"]) == len(results["scores"]) == 32  # the model's context
    assert text.read_text().startswith("".join(results["tokens"]))
    found = results["statistics"]
    assert found["tokens"] == sum(row["tokens"] for row in found["by_class"].values()) == 2 * 3 * 32
    for shown in (found, *found["by_class"].values(), *found["by_position"]):
        assert sum(shown["depth_shares"]) == pytest.approx(1)
    page = (output / "report.html").read_text()
    assert page.count("<img") == 3 and page.count('title="position') == 32 and "http" not in page
    assert {path.stem for path in output.glob("*.png")} == {"heat_map", "depth_by_class", "depth_by_position", "scores"}
    assert "first 32 fit the model" in (output / "report.md").read_text()


def test_mistakes_are_named(data, tmp_path) -> None:
    run = tmp_path / "run"
    train(settings_for(run, data, "recursive"))
    options = ["--checkpoint", str(run), "--output", str(tmp_path / "views")]
    with pytest.raises(UserError, match="a recursive model routes nothing"):
        main([*options, "--text", "hello"])
    with pytest.raises(UserError, match="--text: empty"):
        main([*options, "--text", ""])
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        main([*options, "--text", str(binary)])
    with pytest.raises(UserError, match="--sequences: 0"):
        main([*options, "--text", "a", "--sequences", "0"])
