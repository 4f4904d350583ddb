"""Pictures of a training run."""

from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

_PANELS = {
    "reward_loss": "preference loss (nats)",
    "regularization_loss": "text-generation loss",
    "accuracy": "accuracy on training pairs",
    "logps/chosen": "log-probability of chosen (nats)",
}


def plot_training_curves(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """
    Draw the logged parts of the loss against the training step; without matplotlib, say so and draw nothing.

    Args:
        histories (`dict[str, list[dict]]`): Per run, by its label, the `log_history` of its trainer state.
        path (`Path`): The picture's file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No training curves: install matplotlib, or grm_hf[plots].")
        return
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, _PANELS.items()):
        for run, history in histories.items():
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points), label=run, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
