"""Tiny random backbones and a tokenizer, built in memory."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 320

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Large initial weights, so that soft-caps, scales and positions matter to the outputs.
BACKBONES = {
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 8}),
    "gemma": ("gemma", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.3,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "phi": ("phi", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "phi3": ("phi3", _LLAMA_LIKE),
}
# Backbones whose logits GRM takes from their own forward.
FALLBACKS = {
    "stablelm": ("stablelm", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "gemma3": (
        "gemma3_text",
        {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


def make_config(name):
    model_type, options = {**BACKBONES, **FALLBACKS}[name]
    return AutoConfig.for_model(model_type, **_COMMON, **options, initializer_range=0.3)


def make_base(name, seed=0):
    """A random causal language model in float32 and evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config(name), dtype=torch.float32).eval()


def make_tokenizer(padding_side="right"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["It is clearly no idea. Name number. Please. very user assistant"] * 9, trainer)
    # Text gets a BOS in front, as with Llama's tokenizer.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        padding_side=padding_side,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_rows(num_rows=3, num_responses=2, seed=0):
    """Random rows: each a list of responses `(input_ids, prompt_length)`, of different lengths, under one prompt."""
    generator = random.Random(seed)

    def tokens(length):
        return [generator.randrange(4, VOCAB_SIZE) for _ in range(length)]

    rows = []
    for _ in range(num_rows):
        prompt = tokens(generator.randint(3, 9))
        rows.append([(prompt + tokens(generator.randint(2, 9)), len(prompt)) for _ in range(num_responses)])
    return rows


def pad_rows(rows, side="right", extra=0, pad_token_id=3):
    """
    The batch `(num_rows, num_responses, seq_len)` of `make_rows`, `labels` 0, with `extra` positions more than the longest
    needs. `side` is "left", "right" or "mixed": now left, now right, now on both sides.
    """
    length = max(len(ids) for row in rows for ids, _ in row) + extra
    batch = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for index, (ids, prompt_length) in enumerate(response for row in rows for response in row):
        missing = length - len(ids)
        before = {"left": missing, "right": 0, "mixed": (missing, 0, missing // 2)[index % 3]}[side]
        after = missing - before
        batch["input_ids"].append([pad_token_id] * before + ids + [pad_token_id] * after)
        batch["attention_mask"].append([0] * before + [1] * len(ids) + [0] * after)
        response = [0] * prompt_length + [1] * (len(ids) - prompt_length)
        batch["completion_mask"].append([0] * before + response + [0] * after)
    batch = {name: torch.tensor(values).view(len(rows), -1, length) for name, values in batch.items()}
    return {**batch, "labels": torch.zeros(len(rows), dtype=torch.long)}
