"""Fine-tune a GRM with the stock Trainer, in Python.

    python examples/train_reward_model.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python examples/train_reward_model.py --tiny

Meant for one GPU of 24 GB. With --tiny, a random model and a few made-up rows on a CPU, in seconds: it shows that all
parts run, and its accuracy means nothing.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from grm_hf import (
    GRMForRewardModeling,
    PreferenceCollator,
    RewardMetricsCallback,
    compute_preference_metrics,
    load_preferences,
    tokenize_preferences,
)


def make_tiny_base(folder: Path) -> None:
    """A random Llama over single bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_tiny_rows() -> Dataset:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {
                "prompt": message("user", f"What is {i} + 1?"),
                "chosen": message("assistant", f"It is {i + 1}."),
                "rejected": message("assistant", f"It is {i + 3}, I guess."),
            }
            for i in range(48)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--output_dir", default="outputs/reward_model")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()

    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            make_tiny_base(Path(folder))
            args.model = folder
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = GRMForRewardModeling.from_base_pretrained(args.model, regularization="sft", dtype="float32")
    rows = make_tiny_rows() if args.tiny else load_preferences(args.dataset)
    rows = rows.select_columns([name for name in rows.column_names if name != "margin"])
    rows = tokenize_preferences(rows, tokenizer, max_length=1024)
    splits = rows.train_test_split(test_size=0.02 if not args.tiny else 0.25, seed=0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            per_device_train_batch_size=8,
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_grad_norm=5.0,
            max_steps=4 if args.tiny else -1,
            logging_steps=2 if args.tiny else 20,
            bf16=not args.tiny,
            save_strategy="no",
            report_to="none",
            # Batches of like lengths: the column `length` would not survive `remove_unused_columns`.
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=PreferenceCollator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_preference_metrics,
    )
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
