"""The same code on a CUDA device, in bf16."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline
from transformers.utils import is_flash_attn_2_available

from grm_hf import PreferenceCollator, RewardMetricsCallback, add_reference_logps
from grm_hf.cli import main


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "attention",
    [
        "sdpa",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn"),
        ),
    ],
)
def test_stock_trainer_trains_in_bf16_with_a_float32_head(attention, make_grm, tokenized, tokenizer, tmp_path):
    model = make_grm(dtype=torch.bfloat16, attn_implementation=attention)
    args = TrainingArguments(str(tmp_path), max_steps=3, bf16=True, gradient_checkpointing=True, report_to="none")
    trainer = Trainer(model, args, PreferenceCollator(tokenizer), tokenized, processing_class=tokenizer)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    assert model.device.type == "cuda"
    assert {parameter.dtype for parameter in model.score.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    trainer.save_model()
    assert set(pipeline("reward-modeling", model=str(tmp_path), device=0)("Name number 3.")) == {"score"}


def test_rewards_on_a_gpu_are_those_on_a_cpu(make_grm, tokenized, tokenizer):
    model = make_grm(dtype=torch.float32).eval()
    batch = PreferenceCollator(tokenizer)(list(tokenized))
    with torch.no_grad():
        on_cpu = model(**batch)
        on_gpu = model.cuda()(**{name: tensor.cuda() for name, tensor in batch.items()})
    torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(on_gpu.logps.cpu(), on_cpu.logps, atol=1e-3, rtol=1e-4)


def test_command_line_computes_reference_log_probabilities_on_the_gpu(base_folder, tmp_path, monkeypatch):
    row = {"prompt": "Name a number.", "chosen": "Three.", "rejected": "A tree."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    devices = []

    def add(dataset, model):
        devices.append(model.device.type)
        return add_reference_logps(dataset, model)

    monkeypatch.setattr("grm_hf.cli.train.add_reference_logps", add)
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    flags += ["--regularization", "dpo", "--report_to", "none"]
    assert main(["train", "--model_name_or_path", str(base_folder), *flags]) == 0
    assert devices == ["cuda"]
