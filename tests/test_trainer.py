"""The stock Trainer, without a subclass: what it trains, logs, saves and resumes is right for a GRM."""

import math

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_base
from training import distance, losses, training_logs, weights_of
from transformers import AutoModel

from grm_hf import (
    GRMForRewardModeling,
    PreferenceCollator,
    RewardMetricsCallback,
    add_reference_logps,
    tokenize_preferences,
)


PREFERENCE_METRICS = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
TRAINING_METRICS = {"reward_loss", "regularization_loss", "logps/chosen", *PREFERENCE_METRICS}


@pytest.fixture
def make_untied_grm(tmp_path):
    """`make_untied_grm(**options)`: a GRM whose lm_head is not the input embedding."""
    make_base("llama-untied").save_pretrained(tmp_path / "untied")

    def make(**options):
        torch.manual_seed(0)
        options = {"head_hidden_size": 16, "head_dropout": 0.0, **options}
        return GRMForRewardModeling.from_base_pretrained(tmp_path / "untied", **options)

    return make


@pytest.mark.parametrize(
    ("num_rows", "whole", "accumulated"),
    [(8, (4, 1), (1, 4)), (8, (4, 1), (2, 2)), (6, (4, 1), (1, 4)), (7, (6, 1), (2, 3)), (6, (6, 1), (4, 2))],
    ids=["1x4", "2x2", "tail of two steps", "tail of half a micro-batch", "uneven micro-batches"],
)
def test_accumulation_gives_the_weights_and_losses_of_one_large_batch(
    num_rows, whole, accumulated, make_grm, make_trainer, tokenized
):
    runs = []
    for batch_size, steps in (whole, accumulated):
        trainer = make_trainer(
            make_grm(head_dropout=0.0),
            tokenized.select(range(num_rows)),
            num_train_epochs=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        runs.append((weights_of(trainer.model), losses(trainer)))
    assert distance(runs[0][0], weights_of(make_grm())) > 1e-2
    assert distance(runs[0][0], runs[1][0]) < 1e-5
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-5)


def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(make_grm, make_trainer, tokenized, tmp_path):
    arguments = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "random",
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    # With dropout, so that the random state counts.
    whole = make_trainer(make_grm(head_dropout=0.3), tokenized, **arguments)
    RewardMetricsCallback.attach(whole)
    whole.train()
    resumed = make_trainer(make_grm(head_dropout=0.3), tokenized, **arguments)
    RewardMetricsCallback.attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert distance(weights_of(whole.model), weights_of(resumed.model)) == 0
    assert len(training_logs(whole)) == 6
    assert training_logs(whole) == training_logs(resumed)


def test_best_model_is_loaded_at_the_end(make_grm, make_trainer, tokenized):
    # The evaluation prefers what the training rejects, so that it gets worse from step to step.
    swapped = tokenized.map(lambda row: {name: row[name][::-1] for name in ("input_ids", "completion_mask")})
    trainer = make_trainer(
        make_grm(regularization="none"),
        tokenized,
        swapped,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        num_train_epochs=2,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3, 4]
    assert all({f"eval_{name}" for name in PREFERENCE_METRICS} <= entry.keys() for entry in evaluations)
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert best["step"] < 4
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-6)


def test_evaluation_loss_is_the_mean_over_rows_of_uneven_batches(make_grm, make_trainer, tokenized):
    model = make_grm()
    values = [
        make_trainer(model, None, tokenized.select(range(7)), per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for size in (7, 3, 1)
    ]
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)


def test_predict_returns_a_reward_per_response(make_grm, make_trainer, tokenized, tokenizer):
    model = make_grm()
    output = make_trainer(model, None, per_device_eval_batch_size=3).predict(tokenized)
    with torch.no_grad():
        expected = model(**PreferenceCollator(tokenizer)(list(tokenized))).logits
    assert output.predictions.shape == (8, 2)
    assert torch.from_numpy(output.predictions).allclose(expected, atol=1e-5)
    assert output.label_ids.tolist() == [0] * 8
    assert output.metrics["test_accuracy"] == (expected[:, 0] > expected[:, 1]).float().mean()


def test_length_grouping_needs_the_length_column_kept(make_grm, make_trainer, tokenizer):
    words = [20 if i % 2 else 1 for i in range(96)]
    rows = [{"prompt": f"{i}", "chosen": "yes " * n, "rejected": "no " * n} for i, n in enumerate(words)]
    dataset = tokenize_preferences(Dataset.from_list(rows), tokenizer)

    def count_mixed_batches(**arguments):
        trainer = make_trainer(
            make_grm(),
            dataset,
            train_sampling_strategy="group_by_length",
            per_device_train_batch_size=2,
            max_steps=1,
            **arguments,
        )
        trainer.train()
        lengths = [batch["attention_mask"].sum(-1).amax(-1) for batch in trainer.get_train_dataloader()]
        return sum(bool(length.max() - length.min() > 10) for length in lengths)

    assert count_mixed_batches(remove_unused_columns=False) <= 6
    # By default Trainer drops the column first and takes a row's number of responses for its length: no grouping.
    assert count_mixed_batches() >= 12


def test_stream_trains(make_grm, make_trainer, preferences, tokenizer):
    stream = tokenize_preferences(preferences.to_iterable_dataset(), tokenizer)
    streamed = make_trainer(make_grm(head_dropout=0.0), stream, max_steps=3)
    RewardMetricsCallback.attach(streamed)
    streamed.train()
    whole = make_trainer(make_grm(head_dropout=0.0), tokenize_preferences(preferences, tokenizer), max_steps=3)
    whole.train()
    assert losses(streamed) == pytest.approx(losses(whole), abs=1e-6)
    assert all(entry.keys() >= TRAINING_METRICS for entry in training_logs(streamed))


@pytest.mark.parametrize("options", [{}, {"regularization": "dpo_reference_free"}, {"regularization": "none"}])
def test_gradient_checkpointing_gives_the_same_weights(options, make_grm, make_trainer, tokenized):
    runs = []
    for gradient_checkpointing in (False, True):
        model = make_grm(head_dropout=0.0, **options)
        make_trainer(model, tokenized, gradient_checkpointing=gradient_checkpointing).train()
        assert model.is_gradient_checkpointing == gradient_checkpointing
        runs.append(weights_of(model))
    assert distance(*runs) < 1e-6


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_zero_weight_trains_what_no_regularization_does(
    gradient_checkpointing, make_untied_grm, make_trainer, tokenized
):
    runs = []
    for options in ({"regularization_weight": 0.0}, {"regularization": "none"}):
        model = make_untied_grm(**options)
        trainer = make_trainer(model, tokenized, gradient_checkpointing=gradient_checkpointing)
        RewardMetricsCallback.attach(trainer)
        trainer.train()
        for entry in training_logs(trainer):
            assert entry["loss"] == pytest.approx(entry["reward_loss"], abs=1e-6)
            assert "regularization_loss" not in entry
            assert "logps/chosen" not in entry
        runs.append(weights_of(model))
    assert distance(*runs) == 0
    before = weights_of(make_untied_grm())
    assert runs[0]["backbone.lm_head.weight"].equal(before["backbone.lm_head.weight"])
    assert not runs[0]["backbone.model.embed_tokens.weight"].equal(before["backbone.model.embed_tokens.weight"])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("regularization", ["sft", "none"])
def test_frozen_backbone_trains_the_head_alone(
    regularization, gradient_checkpointing, make_grm, make_trainer, tokenized
):
    model = make_grm(regularization=regularization)
    model.backbone.requires_grad_(False)
    before = weights_of(model)
    trainer = make_trainer(model, tokenized, gradient_checkpointing=gradient_checkpointing)
    trainer.train()
    changed = {name for name, weight in weights_of(model).items() if not weight.equal(before[name])}
    # The last bias is common to all rewards, so that rounding alone moves it.
    assert changed | {"score.layers.1.bias"} == {name for name in before if name.startswith("score.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_training_keeps_a_float32_head(dtype, make_grm, make_trainer, tokenized):
    model = make_grm(dtype=dtype)
    before = weights_of(model)
    trainer = make_trainer(model, tokenized, bf16=True, num_train_epochs=4)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {parameter.dtype for parameter in model.score.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {dtype}
    assert (
        distance(weights_of(model.score), {k.removeprefix("score."): v for k, v in before.items() if "score" in k}) > 0
    )
    rewards = trainer.predict(tokenized).predictions
    assert rewards.dtype == "float32"
    # None of them is a bf16 number by rounding.
    assert not torch.from_numpy(rewards).equal(torch.from_numpy(rewards).bfloat16().float())


def test_saved_model_has_the_rewards_of_the_trained_one(make_grm, make_trainer, tokenized, tmp_path):
    trainer = make_trainer(make_grm(), tokenized)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    reloaded = AutoModel.from_pretrained(tmp_path / "saved")
    expected = trainer.predict(tokenized).predictions
    assert (make_trainer(reloaded, None).predict(tokenized).predictions == expected).all()
    assert (tmp_path / "saved" / "tokenizer.json").exists()


@pytest.mark.slow
def test_compiled_model_trains_and_logs_like_a_plain_one(make_grm, make_trainer, tokenized):
    runs = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make_trainer(make_grm(head_dropout=0.0), tokenized, tokenized, num_train_epochs=2, **arguments)
        RewardMetricsCallback.attach(trainer)
        trainer.train()
        runs.append((training_logs(trainer), trainer.evaluate()))
    for plain, compiled in zip(runs[0][0], runs[1][0]):
        for name in TRAINING_METRICS:
            assert compiled[name] == pytest.approx(plain[name], abs=1e-4), name
    for name in TRAINING_METRICS:
        assert runs[1][1][f"eval_{name}"] == pytest.approx(runs[0][1][f"eval_{name}"], abs=1e-4), name


def expected_metrics(model, rows, tokenizer):
    """The callback's metrics of `rows` in one batch, from a forward of our own."""
    with torch.no_grad():
        output = model(**PreferenceCollator(tokenizer)(rows))
    margins = output.logits[:, 0] - output.logits[:, 1]
    values = {
        "reward_loss": output.reward_loss,
        "accuracy": (margins > 0).float().mean(),
        "margin": margins.mean(),
        "mean_reward": output.logits.mean(),
        "min_reward": output.logits.min(),
        "max_reward": output.logits.max(),
    }
    if output.regularization_loss is not None:
        values["regularization_loss"] = output.regularization_loss
        values["logps/chosen"] = output.logps[:, 0].mean()
        values["logps/rejected"] = output.logps[:, 1].mean()
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("regularization", ["sft", "nll", "dpo_reference_free", "none"])
def test_training_log_has_the_parts_of_the_loss(regularization, make_grm, make_trainer, tokenized, tokenizer):
    model = make_grm(head_dropout=0.0, regularization=regularization)
    expected = expected_metrics(model, list(tokenized.select(range(4))), tokenizer)
    if regularization in ("sft", "nll"):
        # Only the preferred response passes the language-model head.
        expected.pop("logps/rejected")
    trainer = make_trainer(model, tokenized)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    entry = training_logs(trainer)[0]
    assert {name: entry.get(name) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert ("logps/rejected" in entry) == (regularization == "dpo_reference_free")


def test_training_log_covers_all_rows_since_the_last_one(make_grm, make_trainer, tokenized, tokenizer):
    # Uneven micro-batches, and a learning rate that keeps the weights.
    model = make_grm(head_dropout=0.0)
    trainer = make_trainer(
        model,
        tokenized.select(range(7)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        learning_rate=0.0,
    )
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    (entry,) = training_logs(trainer)
    expected = expected_metrics(model, list(tokenized.select(range(7))), tokenizer)
    expected.pop("logps/rejected")
    assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("regularization", ["sft", "dpo_reference_free", "none"])
@pytest.mark.parametrize("has_compute_metrics", [True, False])
def test_evaluation_has_the_parts_of_the_loss(
    has_compute_metrics, regularization, make_grm, make_trainer, tokenized, tokenizer
):
    model = make_grm(regularization=regularization)
    options = {} if has_compute_metrics else {"compute_metrics": None}
    trainer = make_trainer(model, tokenized, tokenized, per_device_eval_batch_size=3, **options)
    RewardMetricsCallback.attach(trainer)
    expected = {f"eval_{name}": value for name, value in expected_metrics(model, list(tokenized), tokenizer).items()}
    metrics = trainer.evaluate()
    assert {name: metrics.get(name) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert metrics.items() <= trainer.state.log_history[-1].items()


def test_evaluation_during_training_leaves_the_training_log_alone(make_grm, make_trainer, tokenized):
    runs = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(make_grm(head_dropout=0.0), tokenized, tokenized, logging_steps=2, **arguments)
        RewardMetricsCallback.attach(trainer)
        trainer.train()
        runs.append(training_logs(trainer))
    assert runs[0] == runs[1]


def test_each_evaluation_set_has_its_own_metrics(make_grm, make_trainer, tokenized, tokenizer):
    model = make_grm()
    sets = {"first": tokenized.select(range(3)), "second": tokenized.select(range(3, 8))}
    trainer = make_trainer(model, tokenized, sets)
    RewardMetricsCallback.attach(trainer)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        for key, value in expected_metrics(model, list(rows), tokenizer).items():
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(value, abs=1e-5)


def test_prediction_stays_out_of_the_next_evaluation(make_grm, make_trainer, tokenized):
    trainer = make_trainer(make_grm(), tokenized, tokenized.select(range(4)))
    RewardMetricsCallback.attach(trainer)
    before = trainer.evaluate()
    trainer.predict(tokenized.select(range(4, 8)))
    after = trainer.evaluate()
    for name in TRAINING_METRICS:
        assert after[f"eval_{name}"] == before[f"eval_{name}"], name


def test_own_metric_named_loss_keeps_the_evaluation_prefix(make_grm, make_trainer, tokenized):
    trainer = make_trainer(make_grm(), tokenized, tokenized, compute_metrics=lambda prediction: {"brier_loss": 0.25})
    RewardMetricsCallback.attach(trainer)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in TRAINING_METRICS} <= metrics.keys()


def test_metrics_follow_the_model_of_model_init(make_grm, make_trainer, tokenized):
    trainer = make_trainer(None, tokenized, model_init=lambda: make_grm())
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    assert all(entry.keys() >= TRAINING_METRICS for entry in training_logs(trainer))


@pytest.fixture
def scalars(tmp_path, monkeypatch):
    """`scalars()`: the last value of each scalar that TensorBoard shows."""
    folder = tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))

    def read():
        events = EventAccumulator(str(folder)).Reload()
        return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}

    return read


def test_attached_callback_reaches_tensorboard(scalars, make_grm, make_trainer, tokenized):
    trainer = make_trainer(make_grm(), tokenized, tokenized, eval_strategy="epoch", report_to="tensorboard")
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    shown = scalars()
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    for name in TRAINING_METRICS:
        assert shown[f"train/{name}"] == pytest.approx(training_logs(trainer)[-1][name], rel=1e-5)
        assert shown[f"eval/{name}"] == pytest.approx(evaluation[f"eval_{name}"], rel=1e-5)
    assert "eval/logps/rejected" in shown


def test_callback_passed_as_an_argument_reaches_the_history_alone(scalars, make_grm, make_trainer, tokenized):
    trainer = make_trainer(
        make_grm(), tokenized, tokenized, report_to="tensorboard", callbacks=[RewardMetricsCallback()]
    )
    trainer.train()
    assert all(entry.keys() >= TRAINING_METRICS for entry in training_logs(trainer))
    assert {f"eval_{name}" for name in TRAINING_METRICS} <= trainer.evaluate().keys()
    assert "train/loss" in scalars()
    assert "train/reward_loss" not in scalars()


def test_policy_equal_to_the_reference_gives_ln_2(make_grm, make_trainer, tokenized, tokenizer):
    model = make_grm(regularization="dpo")
    rows = add_reference_logps(tokenized, model, batch_size=3)
    trainer = make_trainer(model, rows, rows)
    RewardMetricsCallback.attach(trainer)
    assert trainer.evaluate()["eval_regularization_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    logs = training_logs(trainer)
    assert logs[0]["regularization_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[1]["regularization_loss"] != pytest.approx(math.log(2), abs=1e-5)
    assert all({"logps/chosen", "logps/rejected"} <= entry.keys() for entry in logs)
