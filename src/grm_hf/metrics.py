"""Metrics of preference data, and the callback that brings the loss's parts into the stock Trainer's logs."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def preference_margins(rewards: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reward of the preferred response less the best of the others, `(rows,)`: above 0 where the row is right."""
    rewards = np.asarray(rewards, dtype=np.float64)
    is_preferred = np.arange(rewards.shape[1]) == np.asarray(labels)[:, None]
    return rewards[is_preferred] - np.where(is_preferred, -np.inf, rewards).max(axis=1)


def preference_metrics(rewards: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Accuracy, margin and spread of rewards, under the names that TRL logs.

    Args:
        rewards (`np.ndarray` of shape `(rows, num_responses)`): Rewards.
        labels (`np.ndarray` of shape `(rows,)`): Index of the preferred response.

    Returns:
        `dict`: `accuracy` (share of rows whose preferred response has strictly the highest reward: a tie is wrong),
        `margin` (mean reward of the preferred response less the best of the others), `mean_reward`, `min_reward`,
        `max_reward`.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    margins = preference_margins(rewards, labels)
    return {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "mean_reward": float(rewards.mean()),
        "min_reward": float(rewards.min()),
        "max_reward": float(rewards.max()),
    }


def compute_preference_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """[`preference_metrics`] in the form of `Trainer(compute_metrics=...)`."""
    rewards, labels = eval_prediction.predictions, eval_prediction.label_ids
    return preference_metrics(np.asarray(rewards), np.asarray(labels))


def longest_response_accuracy(dataset: Dataset) -> float:
    """Accuracy on tokenized rows of always preferring the response with most tokens; a tie is wrong."""
    lengths = np.array([[sum(mask) for mask in masks] for masks in dataset["completion_mask"]])
    return preference_metrics(lengths, np.zeros(len(lengths), dtype=int))["accuracy"]


def prompt_ids(dataset: Dataset) -> np.ndarray:
    """A number per tokenized row, the same for rows with the same prompt: `(rows,)`."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = []
    for row in dataset:
        ids, mask = row["input_ids"][0], row["completion_mask"][0]
        prompt = tuple(token for token, is_response in zip(ids, mask) if not is_response)
        prompts.append(numbers.setdefault(prompt, len(numbers)))
    return np.array(prompts)


def bootstrap_interval(
    values: np.ndarray, prompts: np.ndarray, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    95% interval of the mean of `values`, by resampling prompts: rows that share a prompt are not independent.

    Args:
        values (`np.ndarray` of shape `(rows,)`): One number per row, such as 1 where the row is right.
        prompts (`np.ndarray` of shape `(rows,)`): As from [`prompt_ids`].
        samples (`int`, defaults to 2000): Number of resamples.
        seed (`int`, defaults to 0): Seed of the resamples.
    """
    sums, counts = np.bincount(prompts, values), np.bincount(prompts)
    draws = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


class RewardMetricsCallback(TrainerCallback):
    """
    Logs, between two logging steps and for each evaluation, `reward_loss`, `regularization_loss`, `logps/chosen`,
    `logps/rejected` (nats, summed over a response) and [`preference_metrics`].

    It reads the outputs of the model's own forward, so nothing is computed twice. It must see a log before the loggers
    (TensorBoard, ...) do, which [`~RewardMetricsCallback.attach`] sees to; passed as `Trainer(callbacks=[...])` it
    comes after them, and its metrics reach `log_history` and the metrics of `evaluate` alone.

    `logps/rejected` is absent while training with "sft" or "nll", which run the language-model head on the preferred
    response alone.

    Example:

    ```python
    trainer = Trainer(...)
    RewardMetricsCallback.attach(trainer)
    ```
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._hook: Any = None
        self._seen: dict[bool, list[dict[str, torch.Tensor]]] = {True: [], False: []}

    @classmethod
    def attach(cls, trainer: Trainer) -> "RewardMetricsCallback":
        """Add the callback to `trainer` before its loggers."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        callback._watch(trainer.model)
        return callback

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._watch(model)

    # `model_init` makes a new model for each training.
    on_train_begin = on_init_end

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        # A prediction logs nothing.
        self._seen[False].clear()

    def _watch(self, model: Any) -> None:
        if model is self._model:
            return
        if self._hook is not None:
            self._hook.remove()
        self._model, self._hook = model, None
        if model is not None:
            self._hook = model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        labels = kwargs.get("labels")
        if labels is None:
            return
        parts = {"rewards": output.logits.detach(), "labels": labels}
        for name in ("reward_loss", "regularization_loss"):
            if output.get(name) is not None:
                parts[name] = output[name].expand(labels.shape[0])
        if output.get("logps") is not None:
            parts["logps"] = output.logps
        self._seen[model.training].append(parts)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        eval_loss = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
        if "loss" in logs:
            metrics = self._metrics(is_training=True)
        elif eval_loss is not None:
            prefix = eval_loss.removesuffix("loss")
            metrics = {f"{prefix}{name}": value for name, value in self._metrics(is_training=False).items()}
        else:
            return
        # The evaluation's own metrics leave out the rows by which processes were evened out.
        metrics = {name: value for name, value in metrics.items() if name not in logs}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def _metrics(self, is_training: bool) -> dict[str, float]:
        seen, self._seen[is_training] = self._seen[is_training], []
        local = [{name: value.float().cpu().numpy() for name, value in parts.items()} for parts in seen]
        batches = gather_object(local)
        if not batches:
            return {}
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        metrics = preference_metrics(joined["rewards"], joined["labels"])
        for name in ("reward_loss", "regularization_loss"):
            if name in joined:
                metrics[name] = float(joined[name].mean())
        if "logps" in joined:
            is_preferred = np.arange(joined["logps"].shape[1]) == joined["labels"][:, None]
            metrics["logps/chosen"] = float(joined["logps"][is_preferred].mean())
            rejected = joined["logps"][~is_preferred]
            if not np.isnan(rejected).any():
                metrics["logps/rejected"] = float(rejected.mean())
        return metrics
