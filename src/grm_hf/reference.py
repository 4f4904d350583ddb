"""Reference log-probabilities for `regularization="dpo"`, computed once, so that no second model stays in memory."""

from contextlib import nullcontext
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from tqdm.auto import tqdm

from .collator import pad_rows


def add_reference_logps(dataset: Dataset, model: Any, batch_size: int = 8) -> Dataset:
    """
    Add the column `ref_logps`: each response's log-probability under `model` as it is now.

    Args:
        dataset (`Dataset`): Rows of [`tokenize_preferences`].
        model ([`GRMForRewardModeling`] or `PeftModel` around one):
            The reference: the model before training. The adapter of a `PeftModel` is switched off.
        batch_size (`int`, defaults to 8): Rows per forward pass.

    Returns:
        `Dataset` with `ref_logps`: per row one number per response, summed over the response's tokens, in nats.

    Raises:
        ValueError: If `dataset` is not tokenized, or is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Reference log-probabilities are stored as a column, which a {type(dataset).__name__} can't hold. "
            "Load the data without streaming, or use regularization='dpo_reference_free'."
        )
    if "input_ids" not in dataset.column_names:
        raise ValueError("The dataset has no `input_ids`; run grm_hf.tokenize_preferences(dataset, tokenizer) first.")
    is_peft = hasattr(model, "disable_adapter")
    grm = model.get_base_model() if is_peft else model
    state = PartialState()
    # Rows of similar length share a batch.
    order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__)
    starts = list(range(0, len(order), batch_size))
    was_training = model.training
    model.eval()
    logps: list[tuple[int, list[float]]] = []
    with model.disable_adapter() if is_peft else nullcontext(), state.split_between_processes(starts) as own_starts:
        for start in tqdm(own_starts, desc="Reference log-probabilities", disable=not state.is_main_process):
            indices = order[start : start + batch_size]
            batch = pad_rows([dataset[index] for index in indices], grm.config.pad_token_id or 0)
            tensors = [batch[name].to(grm.device) for name in ("input_ids", "attention_mask", "completion_mask")]
            logps.extend(zip(indices, grm.response_logps(*tensors).tolist()))
    model.train(was_training)
    values = dict(gather_object(logps))
    column = Dataset.from_dict(
        {"ref_logps": [values[index] for index in range(len(dataset))]},
        features=Features({"ref_logps": SequenceFeature(Value("float32"))}),
    )
    if "ref_logps" in dataset.column_names:
        dataset = dataset.remove_columns("ref_logps")
    return dataset.add_column("ref_logps", column["ref_logps"][:], feature=column.features["ref_logps"])
