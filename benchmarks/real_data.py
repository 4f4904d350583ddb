"""GRM against plain Bradley-Terry on real preference pairs, from a 6M-parameter chat model.

    python benchmarks/real_data.py

Trains both with `grm-hf train --config examples/configs/tiny_real.yaml`, with the same seeds, which draw the training
rows, their order and the reward head; a finished run is not repeated. Writes the table, the numbers and the training
curves to docs/results/. Two CPU cores: about an hour.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from grm_hf.metrics import bootstrap_interval, preference_margins
from grm_hf.plots import plot_training_curves


CONFIG = "examples/configs/tiny_real.yaml"
METHODS = {"GRM (sft)": "sft", "Bradley-Terry": "none"}


def run(regularization: str, seed: int, folder: Path) -> None:
    if (folder / "results.json").exists():
        return
    flags = ["--regularization", regularization, "--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "grm_hf.cli", "train", "--config", CONFIG, *flags], check=True)


def is_right(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Per row of a set whether the chosen response has the highest reward, and the number of its prompt."""
    record = json.loads((folder / "rewards.json").read_text(encoding="utf-8"))[name]
    rewards = np.array(record["rewards"])
    margins = preference_margins(rewards, np.zeros(len(rewards), dtype=int))
    return (margins > 0).astype(float), np.array(record["prompts"])


def summarize(folders: dict[str, list[Path]]) -> list[dict]:
    first = json.loads((next(iter(folders.values()))[0] / "results.json").read_text(encoding="utf-8"))
    rows = []
    for entry in first["evaluation"]:
        name = entry["set"]
        row = {"set": name, "rows": entry["rows"], "longest_response": entry["longest_response"]}
        mean_right = {}
        for method, runs in folders.items():
            right = [is_right(folder, name) for folder in runs]
            prompts = right[0][1]
            accuracies = [values.mean() for values, _ in right]
            mean_right[method] = np.mean([values for values, _ in right], axis=0)
            row[method] = {
                "mean": float(np.mean(accuracies)),
                "std": float(np.std(accuracies, ddof=1)) if len(runs) > 1 else None,
            }
            row[method]["seeds"] = [float(accuracy) for accuracy in accuracies]
        difference = mean_right["GRM (sft)"] - mean_right["Bradley-Terry"]
        row["prompts"] = len(set(prompts.tolist()))
        row["difference"] = {"mean": float(difference.mean()), "interval": bootstrap_interval(difference, prompts)}
        rows.append(row)
    return rows


def as_cell(accuracy: dict) -> str:
    spread = "" if accuracy["std"] is None else f" ± {accuracy['std']:.3f}"
    return f"{accuracy['mean']:.3f}{spread}"


def as_table(rows: list[dict]) -> str:
    lines = [
        f"| set | pairs (prompts) | longest response | {' | '.join(METHODS)} | difference, 95% interval |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    for row in rows:
        cells = [as_cell(row[method]) for method in METHODS]
        low, high = row["difference"]["interval"]
        lines.append(
            f"| {row['set']} | {row['rows']} ({row['prompts']}) | {row['longest_response']:.3f} | {' | '.join(cells)} "
            f"| {row['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("outputs/real_data"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    folders: dict[str, list[Path]] = {method: [] for method in METHODS}
    for seed in args.seeds:
        for method, regularization in METHODS.items():
            folder = args.runs / f"{regularization}-{seed}"
            run(regularization, seed, folder)
            folders[method].append(folder)
    rows = summarize(folders)
    histories = {
        f"{method}, seed {seed}": json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))[
            "log_history"
        ]
        for method, runs in folders.items()
        for seed, folder in zip(args.seeds, runs)
    }
    args.output.mkdir(parents=True, exist_ok=True)
    plot_training_curves(histories, args.output / "real_data_training_curves.png")
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": machine}
    record = {"config": CONFIG, "seeds": args.seeds, **versions, "sets": rows}
    (args.output / "real_data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output / "real_data_table.md").write_text(as_table(rows) + "\n", encoding="utf-8")
    print(as_table(rows))


if __name__ == "__main__":
    main()
