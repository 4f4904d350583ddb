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
    Draw the logged parts of the loss against the training step, faint, and their running mean over some ten logs;
    without matplotlib, say so and draw nothing.

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
            steps = [entry["step"] for entry in history if name in entry]
            if steps:
                values = [entry[name] for entry in history if name in entry]
                (line,) = axes.plot(steps, values, linewidth=0.8, alpha=0.25)
                axes.plot(steps, _running_mean(values), color=line.get_color(), label=run)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def _running_mean(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, without the bias towards 0 at its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
