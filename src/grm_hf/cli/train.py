"""`grm-hf train`: a reward model from a causal language model, with the stock Trainer."""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments, set_seed

from ..collator import PreferenceCollator
from ..data import tokenize_preferences
from ..metrics import (
    RewardMetricsCallback,
    bootstrap_interval,
    compute_preference_metrics,
    longest_response_accuracy,
    preference_margins,
    prompt_ids,
)
from ..modeling import GRMForRewardModeling
from ..plots import plot_training_curves
from ..reference import add_reference_logps
from ..sources import load_preferences
from .options import GRMOptions, parse


logger = logging.getLogger(__name__)

# Unlike the Trainer's own: batches of like lengths waste less on padding, and `length` must survive for that.
DEFAULTS = {"remove_unused_columns": False, "train_sampling_strategy": "group_by_length"}


@dataclass
class ModelOptions:
    """The base model, and which of its weights are trained."""

    model_name_or_path: str = field(default="", metadata={"help": "Causal language model, or a GRM to train further."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the backbone's weights: auto, bfloat16, float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code in the model's repository."})
    chat_template_path: str | None = field(default=None, metadata={"help": "Jinja file, for a tokenizer without one."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the reward head alone."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: a backbone in 4 bits (grm_hf[qlora])."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters and the reward head."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapters' input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], metadata={"help": "Layers with adapters."}
    )


@dataclass
class DataOptions:
    """The preference data, and how it becomes tokens."""

    dataset: str = field(default="", metadata={"help": "Hub dataset, folder or file, as in load_preferences."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dataset_subsample: str | None = field(default=None, metadata={"help": "40K or 400K, for Unified-Feedback."})
    eval_datasets: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation sets as name=path; in YAML a mapping."}
    )
    max_length: int = field(default=1024, metadata={"help": "Most tokens of a prompt with one response."})
    overlong: str = field(default="drop", metadata={"help": "drop, or truncate_prompt (never the response)."})
    eval_max_length: int | None = field(default=None, metadata={"help": "As max_length, for evaluation sets."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows, after drops."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows of each set."})
    use_margin: bool = field(default=False, metadata={"help": "Use the data's margins in the preference loss."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})


def main(argv: list[str]) -> None:
    """Parse `argv`, train, evaluate, save; one line of JSON per evaluation set on stdout."""
    classes = [GRMOptions, ModelOptions, DataOptions, TrainingArguments]
    for line in train(*parse("train", classes, argv, DEFAULTS)):
        print(json.dumps(line), flush=True)


def train(grm: Any, model_options: ModelOptions, data: DataOptions, args: TrainingArguments) -> list[dict[str, Any]]:
    """
    Train a reward model and save it, with its tokenizer, records and training curves, in `args.output_dir`.

    Returns:
        `list[dict]`: per evaluation set `set`, `rows`, the metrics of `Trainer.evaluate`, `accuracy_interval` (95%,
        bootstrap over prompts), and `longest_response`, the accuracy of preferring the longest response. Empty in all
        processes but the first.
    """
    for name, value in (("model_name_or_path", model_options.model_name_or_path), ("dataset", data.dataset)):
        if not value:
            raise ValueError(f"`{name}` is missing; pass --{name} or name it in the --config file")
    if model_options.freeze_backbone and model_options.use_peft:
        raise ValueError("`freeze_backbone` and `use_peft` exclude each other; adapters train the backbone")
    if args.label_smoothing_factor:
        raise ValueError("`label_smoothing_factor` is the Trainer's own; a GRM takes `label_smoothing`")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    # Before the head is drawn.
    set_seed(args.seed)
    tokenizer = _load_tokenizer(model_options)
    with args.main_process_first(desc="tokenizing"):
        train_dataset = _load_rows(data, args.seed, tokenizer)
        eval_datasets = {name: _load_eval_rows(path, data, tokenizer) for name, path in _eval_paths(data)}
    model: Any = _load_model(grm, model_options)
    if model.config.regularization == "dpo" and model.config.uses_language_model:
        if getattr(model, "hf_quantizer", None) is None:
            # The Trainer would move it too late. Quantized weights are on the GPU already.
            model.to(args.device)
        train_dataset = add_reference_logps(train_dataset, model)
        eval_datasets = {name: add_reference_logps(rows, model) for name, rows in eval_datasets.items()}
    if model_options.freeze_backbone:
        model.backbone.requires_grad_(False)
    if model_options.use_peft:
        model = _add_adapters(model, model_options)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=cast(dict[str, Any], eval_datasets) or None,
        data_collator=PreferenceCollator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_preference_metrics,
    )
    RewardMetricsCallback.attach(trainer)
    _keep_float32_rewards(trainer)
    output = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Grouping by length would shuffle the evaluation's rows, whose rewards are recorded in their order.
    args.train_sampling_strategy = "random"
    results, rewards = {}, {}
    for name, rows in eval_datasets.items():
        results[name], rewards[name] = _evaluate(trainer, name, rows)
    if model_options.use_peft:
        _save_merged(trainer, grm, model_options)
    else:
        trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return []
    folder = Path(cast(str, args.output_dir))
    record = {
        "grm": {entry.name: getattr(model.config, entry.name) for entry in fields(grm)},
        "model": asdict(model_options),
        "data": asdict(data),
        "seed": args.seed,
        "train_rows": len(train_dataset),
        "train": output.metrics,
        "evaluation": list(results.values()),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "rewards.json").write_text(json.dumps(rewards) + "\n", encoding="utf-8")
    plot_training_curves({"training": trainer.state.log_history}, folder / "training_curves.png")
    return list(results.values())


def _evaluate(trainer: Trainer, name: str, rows: Dataset) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The record of one evaluation set; and the rewards of its rows, with the numbers of their prompts."""
    rewards: list[np.ndarray] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        rewards.append(cast(np.ndarray, prediction.predictions))
        return compute_preference_metrics(prediction)

    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate(cast(Any, rows), metric_key_prefix=name)
    prompts = prompt_ids(rows)
    is_right = preference_margins(rewards[0], np.zeros(len(rows), dtype=int)) > 0
    record = {
        "set": name,
        "rows": len(rows),
        "longest_response": longest_response_accuracy(rows),
        "accuracy_interval": bootstrap_interval(is_right, prompts),
        **{key.removeprefix(f"{name}_"): value for key, value in metrics.items()},
    }
    return record, {"prompts": prompts.tolist(), "rewards": rewards[0].tolist()}


def _keep_float32_rewards(trainer: Trainer) -> None:
    # accelerate's mixed precision casts the outputs of every FSDP2 unit, the rewards among them, to bf16.
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def _load_tokenizer(options: ModelOptions) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(
        options.model_name_or_path, revision=options.model_revision, trust_remote_code=options.trust_remote_code
    )
    if options.chat_template_path is not None:
        tokenizer.chat_template = Path(options.chat_template_path).read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        # Rewards are read by the attention mask; this is for those who score batches with the saved tokenizer.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_rows(data: DataOptions, seed: int, tokenizer: Any) -> Dataset:
    rows = load_preferences(
        data.dataset, data.dataset_config, split=data.dataset_split, subsample=data.dataset_subsample
    )
    rows = cast(Dataset, rows).shuffle(seed=seed)
    if not data.use_margin and "margin" in rows.column_names:
        rows = rows.remove_columns("margin")
    rows = tokenize_preferences(rows, tokenizer, data.max_length, data.overlong, data.dataset_num_proc)
    if data.max_train_samples is not None and len(rows) < data.max_train_samples:
        logger.warning("Only %d rows are left of max_train_samples=%d.", len(rows), data.max_train_samples)
    return rows.select(range(min(len(rows), data.max_train_samples or len(rows))))


def _load_eval_rows(path: str, data: DataOptions, tokenizer: Any) -> Dataset:
    path, _, split = path.partition("@")
    rows = cast(Dataset, load_preferences(path, split=split or "train"))
    if "margin" in rows.column_names:
        rows = rows.remove_columns("margin")
    if data.max_eval_samples is not None and data.max_eval_samples < len(rows):
        # Files may be sorted; every run sees the same rows.
        rows = rows.shuffle(seed=0).select(range(data.max_eval_samples))
    limit = data.eval_max_length or data.max_length
    rows = tokenize_preferences(rows, tokenizer, limit, "truncate_prompt", data.dataset_num_proc)
    # Neighbours share a batch.
    return rows.sort("length")


def _eval_paths(data: DataOptions) -> list[tuple[str, str]]:
    for entry in data.eval_datasets:
        if "=" not in entry:
            raise ValueError(f"`eval_datasets` takes name=path, or name=path@split, got {entry!r}")
    return [(name, path) for name, _, path in (entry.partition("=") for entry in data.eval_datasets)]


def _load_model(grm: Any, options: ModelOptions) -> GRMForRewardModeling:
    hub = {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}
    arguments: dict[str, Any] = {"dtype": options.dtype, **hub}
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit:
        import torch
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    given = {name: value for name, value in asdict(grm).items() if value is not None}
    config = AutoConfig.from_pretrained(options.model_name_or_path, **hub)
    if config.model_type != "grm":
        return GRMForRewardModeling.from_base_pretrained(options.model_name_or_path, **given, **arguments)
    if heads := sorted(name for name in given if name.startswith("head_") and given[name] != getattr(config, name)):
        raise ValueError(f"{options.model_name_or_path} is a GRM with a trained head; {heads} can't be changed")
    return GRMForRewardModeling.from_pretrained(options.model_name_or_path, **given, **arguments)


def _add_adapters(model: GRMForRewardModeling, options: ModelOptions) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if options.load_in_4bit:
        model = prepare_model_for_kbit_training(model)
    targets = options.lora_target_modules
    lora = LoraConfig(
        # This task type trains and saves the reward head with the adapter.
        task_type="SEQ_CLS",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    return get_peft_model(model, lora)


def _save_merged(trainer: Trainer, grm: Any, options: ModelOptions) -> None:
    """The adapter in `adapter/`, and the merged model, which needs no PEFT to load, in the output folder itself."""
    from peft import PeftModel

    folder = Path(cast(str, trainer.args.output_dir))
    trainer.save_model(str(folder / "adapter"))
    if not trainer.is_world_process_zero():
        return
    # Merged into a fresh copy: four-bit weights would round the adapter away, and sharded weights are not all here.
    options = replace(options, load_in_4bit=False, attn_implementation=None)
    model = PeftModel.from_pretrained(cast(Any, _load_model(grm, options)), str(folder / "adapter"))
    model.merge_and_unload().save_pretrained(folder)
    cast(Any, trainer.processing_class).save_pretrained(folder)
