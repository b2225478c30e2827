"""Calibration of exits and the fit of their classifier: p-values by hand, and whole tiny runs by the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep.settings import UserError
from model.inference.text import load_checkpoint
from pretrain.evaluate import main
from pretrain.exits import calibrate, distance, fit_classifier, hoeffding_bentkus
from tests.helpers.corpus import prepare_tiny
from tests.helpers.experiments import settings_for, train
from tests.helpers.tiny import VOCABULARY, tiny_model


def test_p_values_by_hand():
    assert hoeffding_bentkus(0.0, 50, 0.1) == pytest.approx(0.9**50)  # both bounds, one without its factor e
    exact = sum(math.comb(40, k) * 0.2**k * 0.8 ** (40 - k) for k in range(5))
    hoeffding = math.exp(-40 * (0.1 * math.log(0.5) + 0.9 * math.log(0.9 / 0.8)))
    assert hoeffding_bentkus(0.1, 40, 0.2) == pytest.approx(min(hoeffding, math.e * exact))
    assert hoeffding_bentkus(0.3, 40, 0.2) == 1.0


def test_a_test_at_the_border_is_wrong_no_more_often_than_its_level():
    """Distances of mean exactly delta, 0 or 1: the p-value is at most epsilon in no more than that share of cases."""
    dice = torch.Generator().manual_seed(0)
    means = torch.bernoulli(torch.full((4000, 60), 0.1), generator=dice).mean(1)
    wrong = sum(hoeffding_bentkus(mean, 60, 0.1) <= 0.05 for mean in means.tolist()) / len(means)
    assert wrong <= 0.05


def test_distances():
    assert distance([1, 2, 3], [1, 2, 3]) == 0.0 and distance([1, 2], [3, 4]) == 1.0
    assert distance([1, 2, 3, 4], [1, 3, 4, 5]) == pytest.approx(0.25)


def test_the_threshold_is_the_last_that_passed_and_the_engine_uses_it():
    model = tiny_model("exit", 1)
    dice = torch.Generator().manual_seed(3)
    texts = torch.randint(1, VOCABULARY, (60, 12), generator=dice).tolist()
    prompts, references = [t[:6] for t in texts], [t[6:] for t in texts]
    found = calibrate(model, prompts, references, delta=0.3, thresholds=[0.5, 0.2, 0.1, 0.06, 0.04, 0.02, 0.0])
    passed = [trial.threshold for trial in found.trials if trial.p_value <= found.epsilon]
    assert passed and found.threshold == passed[-1] == model.config.exit_threshold
    assert [t.threshold for t in found.trials[: len(passed)]] == passed and len(found.trials) == len(passed) + 1
    assert found.trials[0].risk == 0.0 and found.trials[0].layers == 6.0  # nobody leaves, at the price of the checks
    assert found.trials[0].flops > 1.0 > found.trials[-1].layers / 6


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(ValueError, match="needs a model with exits"):
        calibrate(tiny_model("recursive"), [[1]] * 60, [[2]] * 60)
    with pytest.raises(ValueError, match=r"calibration-prompts: 5 cannot show .* use at least 29"):
        calibrate(tiny_model("exit"), [[1]] * 5, [[2]] * 5)
    with pytest.raises(ValueError, match="takes 'classifier'"):
        fit_classifier(tiny_model("exit"), [])


def test_the_command_fits_calibrates_and_leaves_a_folder_to_serve(tmp_path: Path, capsys):
    prepare_tiny(tmp_path / "data")
    model = {"exit_measure": "classifier", "exit_layers": [2, 4]}
    train(settings_for(tmp_path / "run", tmp_path / "data", "early_exit", model=model))
    command = ["--checkpoint", str(tmp_path / "run"), "--prompt-tokens", "8", "--output-tokens", "4"]
    with pytest.raises(UserError, match="more than the 32 tokens"):
        main([*command, "--calibrate", "text", "--prompt-tokens", "30"])
    main([*command, "--calibrate", "risk", "--fit-classifier", "6", "--delta", "0.5", "--calibration-prompts", "20"])
    results = json.loads((tmp_path / "run/calibrated/calibration.json").read_text())
    assert results["classifier"]["last"]["loss"] < results["classifier"]["first"]["loss"]
    calibrated, _ = load_checkpoint(tmp_path / "run/calibrated")
    assert calibrated.config.exit_threshold == results["calibration"]["threshold"]
    assert calibrated.model.depth.classifier_weight.abs().sum() > 0
    assert "FLOPs (exact)" in capsys.readouterr().out
