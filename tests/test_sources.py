"""Rows under the column names of the published datasets become TRL preference rows."""

import gzip
import json
import pickle

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from transformers.utils import logging

from grm_hf import load_preferences, to_preferences, tokenize_preferences


MESSAGES = [{"role": Value("string"), "content": Value("string")}]
INSTRUCTION = "Generate one-sentence summary for the following post: "


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def unified_row(rating_a, rating_b, source="lmsys/chatbot_arena_conversations", number=0, **other):
    return {
        "id": f"row_{number}",
        "conv_A": turns(f" Please {number}. ", "It is A."),
        "conv_B": turns(f" Please {number}. ", "It is B."),
        "conv_A_rating": rating_a,
        "conv_B_rating": rating_b,
        "num_turns": 1,
        "source": source,
        **other,
    }


def unified(*rows):
    features = Features(
        {
            "id": Value("string"),
            "conv_A": MESSAGES,
            "conv_B": MESSAGES,
            "conv_A_rating": Value("float32"),
            "conv_B_rating": Value("float32"),
            "num_turns": Value("int32"),
            "source": Value("string"),
        }
    )
    return Dataset.from_list(list(rows), features=features)


def ultrafeedback(with_prompt=True):
    row = {
        "prompt": "Name a number.",
        "prompt_id": "f0e37e9f",
        "chosen": turns("Name a number.", "It is seven."),
        "rejected": turns("Name a number.", "No idea."),
        "messages": turns("Name a number.", "It is seven."),
        "score_chosen": 8.5,
        "score_rejected": 7.0,
    }
    if not with_prompt:
        row = {name: row[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")}
    return Dataset.from_list([row])


def preference_700k():
    rows = [
        {
            "rejected": turns("Name a number.", "No idea."),
            "rejected_score": rejected_score,
            "chosen_score": chosen_score,
            "chosen": turns("Name a number.", "It is seven."),
        }
        for chosen_score, rejected_score in [(3.0, 1.0), (None, None)]
    ]
    score = Value("float64")
    features = {"rejected": MESSAGES, "rejected_score": score, "chosen_score": score, "chosen": MESSAGES}
    return Dataset.from_list(rows, features=Features(features))


def skywork():
    row = {"chosen": turns("Please.", "It is so."), "rejected": turns("Please.", "No."), "source": "offsetbias"}
    return Dataset.from_list([row])


def hh(*rows):
    return Dataset.from_list([{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])


def hh_pair():
    start = "\n\nHuman: Name a number.\n\nAssistant: Please?\n\nHuman: A number.\n\nAssistant:"
    return f"{start} It is seven.", f"{start} No idea."


def unknown_columns(dataset):
    """The dataset as a stream that does not know its columns."""
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    assert stream.column_names is None
    return stream


PUBLISHED = {
    "unified": lambda: unified(unified_row(1.0, 0.0), unified_row(2.0, 5.0)),
    "skywork": skywork,
    "preference_700k": preference_700k,
    "hh": lambda: hh(hh_pair()),
    "ultrafeedback": ultrafeedback,
    "ultrafeedback_trl": lambda: ultrafeedback(with_prompt=False),
}


@pytest.fixture
def warnings(monkeypatch):
    """The messages of `logger.warning` and `logger.warning_once` of grm_hf.sources, in order."""
    messages = []
    logger = logging.get_logger("grm_hf.sources")
    monkeypatch.setattr(logger, "warning", lambda message: messages.append(message))
    # Streams warn row by row; the real method repeats no message.
    monkeypatch.setattr(logger, "warning_once", lambda m: None if m in messages else messages.append(m), raising=False)
    return messages


def test_higher_rated_conversation_is_chosen():
    rows = list(to_preferences(unified(unified_row(2.0, 5.0), unified_row(1.0, 0.0))))
    assert rows[0] == {
        "prompt": turns(" Please 0. "),
        "chosen": [{"role": "assistant", "content": "It is B."}],
        "rejected": [{"role": "assistant", "content": "It is A."}],
        "margin": 3.0,
    }
    assert rows[1]["chosen"][0]["content"] == "It is A."
    assert rows[1]["margin"] == 1.0


def test_ties_and_missing_ratings_are_dropped_and_counted(warnings):
    dataset = unified(
        unified_row(1.0, 0.0, number=0),
        unified_row(0.5, 0.5, number=1),
        unified_row(None, 1.0, number=2),
        unified_row(float("nan"), 1.0, number=3),
        unified_row(-3.0, -1.0, number=4),
    )
    rows = list(to_preferences(dataset))
    assert [row["prompt"][0]["content"] for row in rows] == [" Please 0. ", " Please 4. "]
    assert rows[1]["margin"] == 2.0
    assert warnings[0] == "Dropped 3 of 5 rows with equal or missing ratings."


def test_only_ties_is_an_error():
    with pytest.raises(ValueError, match=r"Dropped 1 of 1 rows with equal or missing ratings. No row is left."):
        to_preferences(unified(unified_row(1.0, 1.0)))


def test_posts_to_summarize_get_the_instruction():
    source = "openai/summarize_from_feedback(comparisons)"
    post, other = to_preferences(unified(unified_row(1.0, 0.0, source), unified_row(1.0, 0.0, None)))
    assert post["prompt"] == turns(f"{INSTRUCTION}Please 0.")
    assert other["prompt"] == turns(" Please 0. ")


def test_later_user_turns_are_no_part_of_the_completion(tokenizer):
    row = unified_row(1.0, 0.0)
    row["conv_A"] = turns("Name a number.", "It is seven.", "Please.", "Very clearly.")
    row["conv_B"] = turns("Name a number.", "No idea.", "Please.", "It is number.")
    preferences = to_preferences(unified(row))
    assert preferences[0]["prompt"] == turns("Name a number.")
    assert [message["role"] for message in preferences[0]["chosen"]] == ["assistant", "user", "assistant"]
    tokenized = tokenize_preferences(preferences, tokenizer)[0]
    ids, mask = tokenized["input_ids"][0], tokenized["completion_mask"][0]
    completion = tokenizer.decode([token for token, is_completion in zip(ids, mask) if is_completion])
    assert "seven" in completion
    assert "clearly" in completion
    assert "Please" not in completion


@pytest.mark.parametrize(("subsample", "step"), [("40K", 20), ("400K", 2), (None, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_subsample_takes_every_nth_row_after_ties(subsample, step, stream):
    rows = [unified_row(1.0, float(number % 3 == 0), number=number) for number in range(90)]
    untied = [number for number in range(90) if number % 3]
    dataset = unified(*rows)
    preferences = to_preferences(dataset.to_iterable_dataset() if stream else dataset, subsample=subsample)
    contents = [row["prompt"][0]["content"] for row in preferences]
    assert contents == [f" Please {number}. " for number in untied[::step]]


@pytest.mark.parametrize(
    ("make", "subsample"), [(PUBLISHED["unified"], "40k"), (PUBLISHED["unified"], 20), (skywork, "40K")]
)
def test_subsample_that_does_not_apply_is_an_error(make, subsample):
    with pytest.raises(ValueError, match=r"`subsample` must be None, or one of \['400K', '40K'\] for a dataset with"):
        to_preferences(make(), subsample=subsample)


def test_unusable_rated_row_is_named():
    with pytest.raises(ValueError, match=r"Row 1 of those used, id 'row_7': `chosen` is None\."):
        to_preferences(unified(unified_row(1.0, 0.0), unified_row(1.0, 0.0, number=7, conv_A=None)))


def test_skywork_is_in_trl_format_already():
    dataset = skywork()
    assert to_preferences(dataset) is dataset


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name. ", "chosen": "It is.", "rejected": "No."},
        {"chosen": "Name. It is.", "rejected": "Name. No."},
        {"prompt": turns("Name."), "chosen": turns("Name.", "Yes.")[1:], "rejected": turns("Name.", "No.")[1:]},
        {
            "prompt": turns("Name."),
            "chosen": [],
            "rejected": [],
            "margin": 1.0,
            "score_chosen": 3,
            "score_rejected": 1,
        },
        {"prompt": "\n\nHuman: Name.\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
    ],
)
def test_trl_format_is_unchanged(row):
    dataset = Dataset.from_list([row])
    assert to_preferences(dataset) is dataset
    stream = dataset.to_iterable_dataset()
    assert to_preferences(stream) is stream


def test_margin_is_the_difference_of_scores_and_0_without(warnings):
    preferences = to_preferences(preference_700k())
    assert preferences["margin"] == [2.0, 0.0]
    assert preferences.features["margin"] == Value("float32")
    assert sorted(preferences.column_names) == ["chosen", "margin", "rejected"]
    assert warnings == [
        "`margin` is chosen_score less rejected_score, in the source's units; training asks the chosen response for that "
        'lead. Use dataset.remove_columns("margin") to train without it, as the paper does with GRM.'
    ]


def test_integer_scores_give_a_float_margin():
    dataset = preference_700k().select([0]).cast_column("chosen_score", Value("int64"))
    assert to_preferences(dataset.cast_column("rejected_score", Value("int64")))[0]["margin"] == 2.0


@pytest.mark.parametrize("with_prompt", [True, False])
def test_ultrafeedback_messages_replace_the_text_prompt(with_prompt):
    assert list(to_preferences(ultrafeedback(with_prompt))) == [
        {
            "chosen": turns("Name a number.", "It is seven."),
            "rejected": turns("Name a number.", "No idea."),
            "margin": 1.5,
        }
    ]


def test_scores_keep_an_explicit_prompt():
    row = {"prompt": "Name. ", "chosen": "It is.", "rejected": "No.", "score_chosen": 2.0, "score_rejected": 3.0}
    expected = {"prompt": "Name. ", "chosen": "It is.", "rejected": "No.", "margin": -1.0}
    assert list(to_preferences(Dataset.from_list([row]))) == [expected]


def test_text_prompt_outside_the_messages_is_an_error():
    row = {"prompt": "Name.", "chosen": turns("", "Yes.")[1:], "rejected": turns("", "No.")[1:]}
    with pytest.raises(ValueError, match=r"`prompt` is text, but `chosen` is a list of messages without it\. Make it"):
        to_preferences(Dataset.from_list([row]))


def test_every_rows_prompt_is_looked_for_in_its_messages():
    rows = [
        {"prompt": prompt, "chosen": turns("Name.", "Yes."), "rejected": turns("Name.", "No.")}
        for prompt in ("Name.", "Another.")
    ]
    with pytest.raises(ValueError, match=r"Row 1: `prompt` is text"):
        to_preferences(Dataset.from_list(rows))


def test_hh_dialogues_become_messages():
    assert list(to_preferences(hh(hh_pair()))) == [
        {
            "prompt": turns("Name a number.", "Please?", "A number."),
            "chosen": [{"role": "assistant", "content": "It is seven."}],
            "rejected": [{"role": "assistant", "content": "No idea."}],
        }
    ]


def test_names_without_a_blank_line_are_content():
    start = "\n\nHuman: Write\nHuman: hi\nAssistant: ho, said the Human: yes"
    row = to_preferences(hh((f"{start}\n\nAssistant: A.\n\nB. Assistant: C.", f"{start}\n\nAssistant: No.")))[0]
    assert row["prompt"] == turns("Write\nHuman: hi\nAssistant: ho, said the Human: yes")
    assert row["chosen"][0]["content"] == "A.\n\nB. Assistant: C."


@pytest.mark.parametrize("start", ["\n\nHuman:", "Human:", "\n\n\nHuman:"])
def test_nothing_comes_before_the_first_turn(start):
    row = to_preferences(hh((f"{start} Name.\n\nAssistant: Yes.", f"{start} Name.\n\nAssistant: No.")))[0]
    assert row["prompt"] == turns("Name.")
    assert row["chosen"] == [{"role": "assistant", "content": "Yes."}]


MALFORMED = [
    "\n\nHuman: Name.",
    "\n\nHuman: Name.\n\nHuman: A number.\n\nAssistant: Yes.",
    "\n\nHuman: Name.\n\nAssistant: Yes.\n\nHuman: Thanks.",
    "\n\nAssistant: Yes.",
    "Well.\n\nHuman: Name.\n\nAssistant: Yes.",
    "Name.",
    "",
    None,
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_dialogues_are_dropped_and_counted(text, warnings):
    good = hh_pair()
    preferences = to_preferences(hh(good, (text, good[1]), (good[0], text), good))
    assert len(preferences) == 2
    assert warnings == ["Dropped 2 of 4 rows that don't alternate from Human: to Assistant: turns, up to an answer."]


def test_only_malformed_dialogues_is_an_error():
    with pytest.raises(ValueError, match=r"Dropped 1 of 1 rows that don't alternate .* No row is left\."):
        to_preferences(hh((MALFORMED[0], MALFORMED[0])))


def test_unknown_layout_is_an_error_that_lists_columns_and_layouts():
    dataset = Dataset.from_list([{"question": "Name.", "answer_0": "Yes.", "answer_1": "No."}])
    with pytest.raises(ValueError, match=r"fits the columns \['answer_0', 'answer_1', 'question'\]") as error:
        to_preferences(dataset)
    for name in (
        "conv_A_rating",
        "hh-rlhf",
        "chosen_score",
        "score_chosen",
        "Skywork",
        "Rename the columns to prompt",
    ):
        assert name in str(error.value)


def test_the_name_of_a_dataset_plays_no_part(tmp_path):
    folder = tmp_path / "Unified-Feedback"
    folder.mkdir()
    skywork().to_json(folder / "train.jsonl")
    assert load_preferences(folder, cache_dir=tmp_path)[0]["source"] == "offsetbias"


def test_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="The dataset has no rows"):
        to_preferences(skywork().select([]))


def test_several_splits_are_an_error():
    splits = DatasetDict({"train": skywork(), "test": skywork()})
    with pytest.raises(ValueError, match=r"Expected one split, got \['test', 'train'\]. Pass for example dataset"):
        to_preferences(splits)


@pytest.mark.parametrize("make_stream", [Dataset.to_iterable_dataset, unknown_columns])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stream_gives_the_rows_of_the_dataset(name, make_stream):
    dataset = PUBLISHED[name]()
    stream = to_preferences(make_stream(dataset))
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(to_preferences(dataset))


def test_a_stream_can_be_sent_to_workers():
    stream = to_preferences(PUBLISHED["unified"]().to_iterable_dataset(), subsample="40K")
    assert list(pickle.loads(pickle.dumps(stream))) == list(stream)


def test_a_stream_warns_once_of_dropped_rows(warnings):
    tied = unified(unified_row(0.0, 0.0), unified_row(0.0, 0.0), unified_row(1.0, 0.0))
    assert len(list(to_preferences(tied.to_iterable_dataset()))) == 1
    malformed = hh(hh_pair(), (MALFORMED[0], MALFORMED[0]), (MALFORMED[0], MALFORMED[0]))
    assert len(list(to_preferences(malformed.to_iterable_dataset()))) == 1
    assert [message for message in warnings if "Dropp" in message] == [
        "Dropping rows with equal or missing ratings.",
        "Dropping rows that don't alternate from Human: to Assistant: turns, up to an answer.",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizer_accepts_every_layout(name, tokenizer):
    dataset = PUBLISHED[name]()
    tokenized = tokenize_preferences(to_preferences(dataset), tokenizer)
    assert len(tokenized) == len(dataset)
    for row in tokenized:
        assert len(row["input_ids"]) == 2
        assert all(sum(mask) > 0 for mask in row["completion_mask"])
    streamed = tokenize_preferences(to_preferences(unknown_columns(dataset)), tokenizer)
    assert list(streamed) == list(tokenized)


def write(dataset, path):
    """The rows as their publisher's file: `None` where a value is missing."""
    text = "".join(json.dumps(row) + "\n" for row in dataset)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_local_files_load(name, suffix, streaming, tmp_path):
    dataset = PUBLISHED[name]()
    loaded = load_preferences(write(dataset, tmp_path / f"rows{suffix}"), streaming=streaming, cache_dir=tmp_path)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert list(loaded) == list(to_preferences(dataset))


def test_patterns_and_slices_of_files_load(tmp_path):
    for part in range(2):
        write(unified(*(unified_row(1.0, 0.0, number=10 * part + i) for i in range(4))), tmp_path / f"{part}.jsonl")
    rows = load_preferences(f"{tmp_path}/*.jsonl", split="train[2:6]", cache_dir=tmp_path)
    assert [row["prompt"][0]["content"] for row in rows] == [f" Please {i}. " for i in (2, 3, 10, 11)]
    assert len(load_preferences(f"{tmp_path}/*.jsonl", subsample="400K", cache_dir=tmp_path)) == 4


def test_the_files_of_a_folder_are_its_splits(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        write(unified(unified_row(1.0, 0.0, number=number)), tmp_path / f"{split}.jsonl.gz")
    rows = load_preferences(str(tmp_path), split="test", cache_dir=tmp_path / "cache")
    assert [row["prompt"][0]["content"] for row in rows] == [" Please 2. "]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(skywork(), tmp_path / "rows.jsonl")
    assert len(load_preferences("~/rows.jsonl", cache_dir=tmp_path)) == 1


def test_missing_files_and_splits_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load_preferences(tmp_path / "missing.jsonl", cache_dir=tmp_path)
    path = write(skywork(), tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r'Unknown split "test"\. Should be one of \[\'train\'\]'):
        load_preferences(path, split="test", cache_dir=tmp_path)


def test_unified_feedback_defaults_to_all_of_it(monkeypatch):
    calls = []

    def fake(path, name, **kwargs):
        calls.append((path, name, kwargs))
        return unified(unified_row(1.0, 0.0))

    monkeypatch.setattr("grm_hf.sources.load_dataset", fake)
    load_preferences("llm-blender/Unified-Feedback", split="val", revision="main")
    load_preferences("llm-blender/Unified-Feedback", "hh-rlhf")
    load_preferences("someone/Unified-Feedback")
    assert [call[:2] for call in calls] == [
        ("llm-blender/Unified-Feedback", "all"),
        ("llm-blender/Unified-Feedback", "hh-rlhf"),
        ("someone/Unified-Feedback", None),
    ]
    assert calls[0][2] == {"split": "val", "streaming": False, "revision": "main"}
