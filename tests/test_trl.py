"""TRL's RewardTrainer takes a GRM as it takes any sequence classifier: `(rows, seq_len)` in, `(rows, 1)` out."""

import pytest
import torch
from training import weights_of

from grm_hf import PreferenceCollator


trl = pytest.importorskip("trl", exc_type=ImportError)

pytestmark = pytest.mark.slow


@pytest.fixture
def train(make_grm, tokenizer, tmp_path):
    """`train(dataset, **arguments)`: the trainer after one step, and the weights before it."""

    def run(dataset, **arguments):
        model = make_grm()
        before = weights_of(model)
        config = trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        )
        trainer = trl.RewardTrainer(
            model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **arguments
        )
        trainer.train()
        return trainer, before

    return run


def changed_names(trainer, before):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name for name, weight in weights_of(model).items() if name in before and not weight.equal(before[name])}


def test_untokenized_rows_train(train, preferences):
    trainer, before = train(preferences)
    assert {"score.layers.0.weight", "backbone.model.embed_tokens.weight"} <= changed_names(trainer, before)
    entry = trainer.state.log_history[0]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= entry.keys()


def test_tokenized_rows_train_with_the_reward_loss_of_grm(train, tokenized, make_grm, tokenizer):
    rows = tokenized.select(range(4))
    columns = rows.map(
        lambda row: {"chosen_ids": row["input_ids"][0], "rejected_ids": row["input_ids"][1]},
        remove_columns=rows.column_names,
    )
    trainer, before = train(columns)
    assert {"score.layers.0.weight", "backbone.model.embed_tokens.weight"} <= changed_names(trainer, before)
    with torch.no_grad():
        expected = make_grm()(**PreferenceCollator(tokenizer)(list(rows))).reward_loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_lora_trains(train, preferences):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    trainer, _ = train(preferences, peft_config=config)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("score.modules_to_save" in name for name in trainable)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trainable)
