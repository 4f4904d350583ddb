"""Reward models that generalise: GRM (arXiv 2406.10216) for the Hugging Face ecosystem.

Importing this package registers configuration, model and the pipeline task "reward-modeling" with transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .modeling import GRMConfig, GRMForRewardModeling, GRMOutput, GRMPipeline
from .registration import register


if TYPE_CHECKING:
    from .collator import PreferenceCollator
    from .data import tokenize_preferences
    from .metrics import RewardMetricsCallback, compute_preference_metrics
    from .reference import add_reference_logps
    from .scoring import RewardScorer
    from .sources import load_preferences, to_preferences

__version__ = "0.1.0.dev0"

# Imported on first use: `datasets` and `Trainer` take longer to import than the model does.
_LAZY = {
    "PreferenceCollator": "collator",
    "RewardMetricsCallback": "metrics",
    "RewardScorer": "scoring",
    "add_reference_logps": "reference",
    "compute_preference_metrics": "metrics",
    "load_preferences": "sources",
    "to_preferences": "sources",
    "tokenize_preferences": "data",
}

__all__ = [
    "GRMConfig",
    "GRMForRewardModeling",
    "GRMOutput",
    "GRMPipeline",
    "PreferenceCollator",
    "RewardMetricsCallback",
    "RewardScorer",
    "add_reference_logps",
    "compute_preference_metrics",
    "load_preferences",
    "to_preferences",
    "tokenize_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


register()
