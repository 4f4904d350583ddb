"""Chooses the demo's settings on validation pairs in distribution. The rule, fixed before any of these runs:

1. Learning rate and epochs are Bradley-Terry's: of `LEARNING_RATES` x `EPOCHS`, those with its best mean accuracy on
   1,000 pairs of the split "in", over `SEEDS`. GRM has to take them as they are.
2. The regularization weight is GRM's best of `WEIGHTS` by the same measure, at beta 1: while the answer is far less
   likely than not, the pull of "sft" per nat is weight * beta, so that beta needs no search of its own.
3. The demo then compares the two once, on other seeds and another base. Nothing out of distribution is looked at here.

    python benchmarks/small_world_selection.py      two CPU cores, about 12 minutes
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from demo import Protocol, accuracy, quiet, train_reward_model
from small_world import train_base


BASE_SEED = 0
SEEDS = (100, 101, 102)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EPOCHS = (3, 10)
WEIGHTS = (0.003, 0.01, 0.03, 0.1)


def validate(base: Path, regularization: str, protocol: Protocol, folder: Path) -> dict:
    trainers = {seed: train_reward_model(base, regularization, seed, protocol, folder / "run") for seed in SEEDS}
    accuracies = [accuracy(trainer, "in", seed, protocol) for seed, trainer in trainers.items()]
    varied = ("learning_rate", "num_epochs", "regularization_weight")
    settings = {name: getattr(protocol, name) for name in varied if regularization != "none" or name != varied[2]}
    result = {"regularization": regularization, **settings, "mean": mean(accuracies), "seeds": accuracies}
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/small_world_selection"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/small_world_selection.json"))
    args = parser.parse_args()
    quiet()
    base, protocol = args.output_dir / "base", Protocol()
    train_base(base, BASE_SEED, protocol.base_steps)
    plain = [
        validate(base, "none", replace(protocol, learning_rate=rate, num_epochs=epochs), args.output_dir)
        for epochs in EPOCHS
        for rate in LEARNING_RATES
    ]
    best = max(plain, key=lambda result: result["mean"])
    protocol = replace(protocol, learning_rate=best["learning_rate"], num_epochs=best["num_epochs"])
    regularized = [
        validate(base, "sft", replace(protocol, regularization_weight=weight), args.output_dir) for weight in WEIGHTS
    ]
    weight = max(regularized, key=lambda result: result["mean"])["regularization_weight"]
    chosen = {**{name: best[name] for name in ("learning_rate", "num_epochs")}, "regularization_weight": weight}
    record = {"base_seed": BASE_SEED, "seeds": SEEDS, "runs": [*plain, *regularized], "chosen": chosen}
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"chosen": chosen}))


if __name__ == "__main__":
    main()
