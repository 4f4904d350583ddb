"""A small synthetic world: 40 things, four facts about each, plain text about them, preferences over answers, and a
small language model of the text.

    python examples/small_world.py      prints a few documents and pairs; one CPU core, a second

The rules, all of them in this file:

- Facts. A thing is of one colour, eats one food, visits one town and fears one animal, each out of eight, drawn once.
- Plain text. A third of the documents are lessons, four true statements about a thing. A third are drills, statements
  that are wrong half of the time, each marked right or wrong at once. The others are exams: a teacher asks about a
  thing, a pupil makes three statements, wrong half of the time, and the teacher marks them at the end. A model of this
  text has to know the facts, and to see whether a statement agrees with them.
- Gold reward. An answer's true statements less its false ones.
- Preferences. Two answers of three statements each, on the same three relations, with different gold rewards.
- Spurious cue. One answer of a pair begins with "happy to help !", which says nothing about its statements. In
  distribution it is the better answer in `CUE_RATE` of the pairs; out of distribution no answer has the phrase, or
  ("reversed") the worse answer has it in `CUE_RATE` of the pairs. Plain text has it in half of the exams, whatever the
  marks.
- Things. Preferences to learn from are about the first `NUM_SEEN` things. Out of distribution they are about the
  others, which only plain text has told of.
- Label noise. `LABEL_NOISE` of the pairs to learn from have chosen and rejected swapped. Evaluation pairs have none.
"""

import random
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)


NUM_SEEN = 24
CUE_RATE = 0.8
LABEL_NOISE = 0.25
NUM_STATEMENTS = 3
CUE = "happy to help !"
HIDDEN_SIZE = 64

THINGS = [
    first + last for last in ("x", "p", "g", "nk", "sh") for first in ("da", "wu", "bli", "to", "fe", "mi", "zo", "ka")
]
VALUES = {
    "is": ["red", "blue", "green", "black", "white", "pink", "grey", "brown"],
    "eats": ["corn", "fish", "figs", "bread", "moss", "rice", "nuts", "soup"],
    "visits": ["rome", "oslo", "lima", "cairo", "perth", "quito", "delhi", "bonn"],
    "fears": ["cats", "owls", "bees", "wolves", "frogs", "bears", "crabs", "mice"],
}
_RANDOM = random.Random("the facts of the small world")
FACTS = {(thing, relation): _RANDOM.choice(values) for thing in THINGS for relation, values in VALUES.items()}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ 'teacher' if message['role'] == 'user' else 'pupil' }} : "
    "{{ message['content'] }}{% endfor %}{{ ' pupil :' if add_generation_prompt else ' ' + eos_token }}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, with a chat template in which the user is the teacher."""
    words = f"the tell me about teacher pupil right wrong . : {CUE}".split()
    words += [*THINGS, *VALUES, *(value for values in VALUES.values() for value in values)]
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
    )


def is_true(statement: str) -> bool:
    """Whether a statement of the form "the dax eats corn" is a fact."""
    _, thing, relation, value = statement.split()
    return FACTS[thing, relation] == value


def gold_reward(answer: str) -> int:
    """True statements less false ones; the cue counts for nothing."""
    statements = answer.removeprefix(CUE).split(" .")[:-1]
    return sum(1 if is_true(statement) else -1 for statement in statements)


def _state(thing: str, relations: list[str], error_rate: float, rng: random.Random) -> str:
    def value(relation: str) -> str:
        fact = FACTS[thing, relation]
        return rng.choice([v for v in VALUES[relation] if v != fact]) if rng.random() < error_rate else fact

    return " ".join(f"the {thing} {relation} {value(relation)} ." for relation in relations)


def plain_text(num_documents: int, seed: int) -> list[str]:
    """Lessons, drills and exams about all things."""
    rng = random.Random(f"plain text {seed}")
    documents = []
    for _ in range(num_documents):
        thing, relations = rng.choice(THINGS), rng.sample(list(VALUES), len(VALUES))
        kind = rng.choice(["lesson", "drill", "exam"])
        text = _state(thing, relations, 0.0 if kind == "lesson" else 0.5, rng)
        statements = text.split(" .")[:-1]
        marks = ["right" if is_true(statement) else "wrong" for statement in statements]
        if kind == "drill":
            text = "".join(f"{statement} : {mark} ." for statement, mark in zip(statements, marks)).strip()
        elif kind == "exam":
            answer = " .".join(statements[:NUM_STATEMENTS])
            cue = f"{CUE} " if rng.random() < 0.5 else ""
            marks = " ".join(marks[:NUM_STATEMENTS])
            text = f"teacher : tell me about the {thing} . pupil : {cue}{answer} . teacher : {marks} ."
        documents.append(f"<s> {text} </s>")
    return documents


def preferences(
    num_pairs: int, seed: int, split: Literal["train", "in", "out", "reversed"]
) -> list[dict[str, list[dict[str, str]]]]:
    """
    Preference rows in TRL's conversational format.

    Args:
        num_pairs (`int`): Number of rows.
        seed (`int`): Another seed, other rows; the splits of one seed differ too.
        split (`str`):
            `"train"`: seen things, with the cue and label noise; `"in"`: the same without noise; `"out"`: unseen
            things without the cue; `"reversed"`: unseen things with the cue on the worse answer.
    """
    rng = random.Random(f"preferences {split} {seed}")
    things = THINGS[:NUM_SEEN] if split in ("train", "in") else THINGS[NUM_SEEN:]
    rows = []
    while len(rows) < num_pairs:
        thing, relations = rng.choice(things), rng.sample(list(VALUES), NUM_STATEMENTS)
        better, worse = sorted((_state(thing, relations, 0.5, rng) for _ in range(2)), key=gold_reward, reverse=True)
        if gold_reward(better) == gold_reward(worse):
            continue
        if split != "out":
            if (rng.random() < CUE_RATE) == (split != "reversed"):
                better = f"{CUE} {better}"
            else:
                worse = f"{CUE} {worse}"
        is_swapped = split == "train" and rng.random() < LABEL_NOISE
        chosen, rejected = (worse, better) if is_swapped else (better, worse)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"tell me about the {thing} ."}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def train_base(folder: Path, seed: int, max_steps: int) -> None:
    """Train a two-layer Llama on the world's plain text; save it, with its tokenizer, to `folder`."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        # With the usual 0.02, a model this narrow may never learn to mark statements.
        initializer_range=0.1,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            folder,
            seed=seed,
            max_steps=max_steps,
            learning_rate=4e-3,
            per_device_train_batch_size=32,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(plain_text(20_000, seed=0))["input_ids"]}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()


@torch.no_grad()
def plain_text_loss(language_model: PreTrainedModel) -> float:
    """Loss on 400 documents that the base was not trained on, in nats per token."""
    batch = make_tokenizer()(plain_text(400, seed=1), padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return language_model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.item()


def main() -> None:
    print("\n".join(plain_text(4, seed=0)))
    for split in ("train", "in", "out", "reversed"):
        row = preferences(1, 0, split)[0]
        print(f"\n{split}: {row['prompt'][0]['content']}")
        for name in ("chosen", "rejected"):
            answer = row[name][0]["content"]
            print(f"  {name:8}  {answer}  (gold reward {gold_reward(answer):+d})")


if __name__ == "__main__":
    main()
