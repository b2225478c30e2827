"""What the trainer of transformers asks of a model: labels shifted already, checkpointing, its loss in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from model import MoRForCausalLM
from model.layers import DecoderLayer
from tests.helpers.variants import TRAINING
from tests.model.test_modeling import batch, build, gradients


def shifted(ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("name", ["vanilla", "expert-z", "token-z"])
def test_shift_labels_are_targets(name):
    """Alone or in place of labels, in every loss term, with the number of items that the caller counts."""
    model, ids = build(name), batch()
    expected = model(ids, targets=shifted(ids), num_items_in_batch=200).losses
    for labels in (None, ids.flip(1)):
        got = model(ids, labels=labels, shift_labels=shifted(ids), num_items_in_batch=200).losses
        assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in expected.items()}
    mean = model(ids, shift_labels=shifted(ids)).losses["lm"].item()
    assert expected["lm"].item() == pytest.approx(mean * 46 / 200, rel=1e-6)
    with pytest.raises(ValueError, match=r"targets: exclusive with .*shift_labels"):
        model(ids, shift_labels=ids, targets=ids)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"every_n_layers": 2}], ids=str)
@pytest.mark.parametrize("name", TRAINING)
def test_standard_checkpointing_changes_nothing(name, options):
    """Losses, auxiliary ones too, are identical, gradients but for the order of sums; layers it covers run again."""
    model, ids = build(name), batch()
    torch.manual_seed(1)
    plain = model(ids, labels=ids)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    reentrant = {"use_reentrant": options["use_reentrant"]} if "use_reentrant" in options else None
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name of 5.17
    enable(reentrant, every_n_layers=options.get("every_n_layers", 1))
    runs = []
    for layer in model.units():
        layer.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer.gradient_checkpointing))
    torch.manual_seed(1)
    again = model(ids, labels=ids)
    before = len(runs)
    again.loss.backward()
    assert len(runs) - before == sum(runs[:before]) > 0
    assert {k: v.item() for k, v in again.losses.items()} == {k: v.item() for k, v in plain.losses.items()}
    assert gradients(model).keys() == expected.keys()
    for key, value in gradients(model).items():
        largest = float(expected[key].abs().max())
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6 * largest)


def test_standard_checkpointing_is_the_policy_block():
    model = build("expert-z")
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.model.recompute == "block"
    assert all(layer.gradient_checkpointing for layer in model.units())
    model.set_recompute("selective")
    assert not model.is_gradient_checkpointing and model.model.recompute == "selective"
    model.set_recompute("block")
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and model.model.recompute == "none"


def test_recomputation_keeps_no_cache():
    model, ids = build("vanilla"), batch()
    cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 24
    model.gradient_checkpointing_enable()
    output = model(ids, labels=ids, use_cache=True)
    assert output.past_key_values is None
    with pytest.raises(ValueError, match=r"past_key_values: .*set_recompute\('none'\)"):
        model(ids, past_key_values=cache)
    output.loss.backward()
    assert model.eval()(ids, use_cache=True).past_key_values.get_seq_length() == 24


def test_hooks_of_a_layer_stay_outside_its_checkpoint():
    """Those of FSDP2 gather and free weights; a second run would gather them again."""
    model, ids, calls = build("recursive-norms"), batch(), []
    model.set_recompute("block")
    layer = model.units()[1]
    assert isinstance(layer, DecoderLayer)
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 3


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = batch(i % 4, rows=1)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["vanilla", "expert-z", "token-z"])
def test_the_trainer_of_transformers_trains(name, tmp_path: Path):
    """Accumulation and checkpointing on: the loss falls, and the checkpoint loads and continues."""
    model = build(name)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=12,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[0] == pytest.approx(4.1, abs=0.3) and losses[-1] < losses[0] - 0.5
    loaded = MoRForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["vanilla", "expert-z", "token-z"])
def test_the_trainer_of_transformers_evaluates_predicts_and_keeps_the_best(name, tmp_path: Path):
    model = build(name)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    assert trainer.label_names == ["labels"]
    trainer.train()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(measured) == 2 and trainer.state.best_metric == min(measured)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(measured), rel=1e-5)
    predicted = trainer.predict(Rows())
    assert predicted.metrics["test_loss"] == pytest.approx(min(measured), rel=1e-5)
    assert predicted.predictions.shape == (16, *batch().shape[1:], model.config.vocab_size)
    with torch.no_grad():
        rows = torch.stack([Rows()[i]["input_ids"] for i in range(16)])
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), model.eval()(rows).logits)


def test_rows_packed_as_transformers_packs_them_are_documents():
    """Positions that start anew, without a mask; and keywords for other models change nothing."""
    model, ids = build("expert-z").eval(), batch()
    documents = (torch.arange(24) >= 10).long().expand(2, -1)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    with torch.no_grad():
        expected = model(ids, document_ids=documents, position_ids=positions).logits
        assert torch.equal(model(ids, position_ids=positions, seq_idx=None, max_length_q=14).logits, expected)
        assert torch.equal(
            model.model(ids, position_ids=positions, max_length_q=14).last_hidden_state,
            model.model(ids, document_ids=documents, position_ids=positions).last_hidden_state,
        )
        assert not torch.equal(model(ids).logits, expected)
