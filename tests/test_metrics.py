"""Metrics of rewards, checked against hand-made numbers."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from grm_hf import compute_preference_metrics
from grm_hf.metrics import bootstrap_interval, longest_response_accuracy, prompt_ids


def test_pair_metrics_are_those_of_trl():
    rewards = np.array([[2.0, 1.0], [0.0, 3.0]])
    metrics = compute_preference_metrics(EvalPrediction(rewards, np.array([0, 0])))
    expected = {"accuracy": 0.5, "margin": -1.0, "mean_reward": 1.5, "min_reward": 0.0, "max_reward": 3.0}
    assert metrics == pytest.approx(expected)


def test_margin_is_against_the_best_other_response():
    rewards = np.array([[2.0, 1.0, 1.5], [0.0, 3.0, -1.0]])
    metrics = compute_preference_metrics(EvalPrediction(rewards, np.array([0, 1])))
    assert metrics["accuracy"] == 1.0
    assert metrics["margin"] == pytest.approx((0.5 + 3.0) / 2)


def test_tie_is_wrong():
    metrics = compute_preference_metrics(EvalPrediction(np.array([[1.0, 1.0]]), np.array([0])))
    assert metrics["accuracy"] == 0.0


def test_longest_response_counts_response_tokens_alone():
    masks = [[[0, 0, 1, 1], [0, 1]], [[0, 0, 0, 1], [0, 1, 1]], [[0, 1], [1]]]
    assert longest_response_accuracy(Dataset.from_dict({"completion_mask": masks})) == pytest.approx(1 / 3)


def test_rows_with_the_same_prompt_share_a_number():
    rows = {
        "input_ids": [[[5, 6], [5, 7]], [[5, 8], [5, 9]], [[4, 6], [4, 7]]],
        "completion_mask": [[[0, 1], [0, 1]]] * 3,
    }
    assert prompt_ids(Dataset.from_dict(rows)).tolist() == [0, 0, 1]


def test_interval_is_wider_when_rows_share_prompts():
    values = np.repeat(np.random.default_rng(0).integers(0, 2, 50), 8)
    apart = bootstrap_interval(values, np.arange(400))
    together = bootstrap_interval(values, np.repeat(np.arange(50), 8))
    assert apart[0] < values.mean() < apart[1]
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
