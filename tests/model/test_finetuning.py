"""LoRA of PEFT and supervised fine-tuning of TRL, packed rows included, on the models as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from model.folder import write_folder
from model.modeling import MoRForCausalLM
from tests.helpers.tiny import tiny_model
from tests.model.test_export import byte_bpe


@pytest.fixture(scope="module", params=["vanilla", "expert-recursion_wise", "token-shared"])
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    byte_bpe(root / "tokenizer.json")
    write_folder(tiny_model(request.param, 1, vocab_size=290).float(), root / "final", root / "tokenizer.json")
    return root / "final"


@pytest.mark.slow
def test_lora_of_peft_trains_its_own_weights_alone(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = MoRForCausalLM.from_pretrained(folder).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-2)
    ids, losses = torch.arange(1, 41).view(2, 20), []
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(MoRForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    merged = again.merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_trl_fine_tunes_with_peft(folder: Path, tmp_path: Path, packing: bool) -> None:
    trl, peft = (pytest.importorskip(name, reason=f"{name} is not installed") for name in ("trl", "peft"))
    from datasets import Dataset

    texts = Dataset.from_list([{"text": f"the state of the union {i} and the sea"} for i in range(24)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        max_length=64,
        packing=packing,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=MoRForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=texts,
        eval_dataset=texts.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and min(losses[1:]) < losses[0] and len(evaluated) == 1
