"""Training with the stock Trainer, as the tests of one process and the script of several do it."""

from transformers import Trainer, TrainingArguments

from grm_hf import PreferenceCollator, compute_preference_metrics


DEFAULTS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    # With Adam, equal steps may part by rounding where a gradient is all but zero.
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def build_trainer(tokenizer, folder, model, dataset, eval_dataset=None, **options):
    """The stock Trainer, rows in their order. `options` are fields of TrainingArguments, or arguments of Trainer."""
    arguments = {**DEFAULTS, **options}
    names = ("callbacks", "compute_metrics", "model_init")
    options = {name: arguments.pop(name) for name in names if name in arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=PreferenceCollator(tokenizer),
        processing_class=tokenizer,
        **{"compute_metrics": compute_preference_metrics, **options},
    )


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def distance(first, second):
    """Largest difference of two models' weights."""
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer):
    return [entry["loss"] for entry in training_logs(trainer)]
