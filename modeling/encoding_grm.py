"""From text to tokens: the one encoding that training, scoring, evaluation and the pipeline share.

A response is encoded together with its prompt, never on its own: a tokenizer may merge across the boundary. Both come
as text (a string each) or as chat messages; messages go through the chat template, which alone decides about special
tokens, while text gets the tokenizer's own special tokens and an end-of-sequence token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union


Messages = list[dict[str, Any]]
Text = Union[str, Messages]

# In no text that a template adds.
_MARK = "\ue000"
ROLES = ("system", "developer", "user", "assistant", "tool")


class Encoded(NamedTuple):
    """
    Tokens of one prompt with one response.

    Args:
        input_ids (`list[int]`): Tokens.
        completion_mask (`list[int]`): 1 on each token that holds at least one character of the response.
    """

    input_ids: list[int]
    completion_mask: list[int]


class _Rendered(NamedTuple):
    text: str
    # Character spans of the response, end excluded.
    spans: list[tuple[int, int]]
    is_chat: bool


def encode(tokenizer: Any, pairs: Sequence[tuple[Text, Text]]) -> list[Encoded]:
    """
    Tokens and completion mask of (prompt, response) pairs, in one call of the tokenizer per kind of text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template where messages are given.
        pairs (`Sequence` of `(prompt, response)`): Both strings or both lists of messages. The prompt may be empty.

    Returns:
        `list[Encoded]`, one per pair.

    Raises:
        ValueError: If a pair can't be encoded; the message says why.
    """
    prompts: dict[int, str] = {}
    rendered = [_render(tokenizer, prompt, response, prompts) for prompt, response in pairs]
    encoded: list[Optional[Encoded]] = [None] * len(rendered)
    for is_chat in (False, True):
        indices = [i for i, item in enumerate(rendered) if item.is_chat == is_chat]
        if indices:
            for index, item in zip(indices, _tokenize(tokenizer, [rendered[i] for i in indices], is_chat)):
                encoded[index] = item
    return encoded  # type: ignore[return-value]


def as_response(prompt: Text, response: Text) -> Text:
    """`response` in the form of its prompt: text under a prompt of messages becomes the assistant's message."""
    if isinstance(response, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": response}]
    return response


def truncate_prompt(encoded: Encoded, max_length: int, bos_token_id: Optional[int]) -> Optional[Encoded]:
    """
    `encoded` within `max_length` tokens by leaving out the prompt's oldest tokens, a leading BOS excepted.

    Returns:
        [`Encoded`], or `None` where the response alone does not fit.
    """
    excess = len(encoded.input_ids) - max_length
    if excess <= 0:
        return encoded
    start = int(encoded.input_ids[0] == bos_token_id and not encoded.completion_mask[0])
    stop = start + excess
    if 1 in encoded.completion_mask[:stop]:
        return None
    return Encoded(*(values[:start] + values[stop:] for values in encoded))


def _render(tokenizer: Any, prompt: Text, response: Text, prompts: dict[int, str]) -> _Rendered:
    if isinstance(prompt, str) and isinstance(response, str):
        return _Rendered(prompt + response, [(len(prompt), len(prompt) + len(response))], False)
    if isinstance(prompt, str) or isinstance(response, str):
        raise ValueError("the prompt and its response must both be text or both be lists of messages")
    if tokenizer.chat_template is None:
        raise ValueError("it has messages, but the tokenizer has no chat template; set `tokenizer.chat_template`")
    for message in [*prompt, *response]:
        if message.get("role") not in ROLES:
            raise ValueError(f"unknown role {message.get('role')!r}; known roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), (str, list)):
            raise ValueError(f"a message's content must be text, got {message.get('content')!r}")
    messages = [*prompt, *response]
    text = _apply_chat_template(tokenizer, messages)
    spans = []
    for index in range(len(prompt), len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        # A row's responses share their prompt: render it once.
        key = id(prompt) if index == len(prompt) else None
        before = prompts.get(key) if key is not None else None
        if before is None:
            before = _apply_chat_template(tokenizer, messages[:index], add_generation_prompt=True)
            if key is not None:
                prompts[key] = before
        after = text if index == len(messages) - 1 else _apply_chat_template(tokenizer, messages[: index + 1])
        stop = len(after) if text.startswith(after) else _turn_end(tokenizer, messages, index, text, after)
        spans.append((_common_prefix(before, text), stop))
    return _Rendered(text, spans, True)


def _turn_end(tokenizer: Any, messages: Messages, index: int, text: str, after: str) -> int:
    """End of a turn in `text`, for a template that renders it otherwise where it is last, as in `after` (Qwen3's)."""
    content = messages[index]["content"]
    marked = content + _MARK if isinstance(content, str) else [*content, {"type": "text", "text": _MARK}]
    turns = [*messages[:index], {**messages[index], "content": marked}, *messages[index + 1 :]]
    # What follows the content is what the two renderings end with in common.
    length = len(text) - _common_prefix(text[::-1], _apply_chat_template(tokenizer, turns)[::-1])
    rest = text[length:]
    return length + next(size for size in range(min(len(rest), len(after)), -1, -1) if after.endswith(rest[:size]))


def _apply_chat_template(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def _common_prefix(first: str, second: str) -> int:
    # Templates may end a generation prompt in a way that the finished turn does not repeat.
    if second.startswith(first):
        return len(first)
    return next(i for i, (a, b) in enumerate(zip(first + "\0", second + "\1")) if a != b)


def _tokenize(tokenizer: Any, items: list[_Rendered], is_chat: bool) -> list[Encoded]:
    batch = tokenizer(
        [item.text for item in items],
        add_special_tokens=not is_chat,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    results = []
    for index, (item, input_ids) in enumerate(zip(items, batch["input_ids"])):
        mask = [0] * len(input_ids)
        for span in item.spans:
            first, last = _token_span(tokenizer, batch, index, item, span, is_chat)
            mask[first:last] = [1] * (last - first)
        if not is_chat:
            input_ids, mask = _with_special_tokens(tokenizer, input_ids, mask)
        results.append(Encoded(input_ids, mask))
    return results


def _token_span(
    tokenizer: Any, batch: Any, index: int, item: _Rendered, span: tuple[int, int], is_chat: bool
) -> tuple[int, int]:
    """First and past-the-last token that hold a character of `span`."""
    start, stop = span
    if tokenizer.is_fast:
        tokens = (batch.char_to_token(index, char) for char in range(start, stop))
        first = next((token for token in tokens if token is not None), None)
        tokens = (batch.char_to_token(index, char) for char in range(stop - 1, start - 1, -1))
        last = next((token for token in tokens if token is not None), None)
        if first is None or last is None:
            return 0, 0
        # A character may be several tokens.
        input_ids, last = batch["input_ids"][index], last + 1
        while last < len(input_ids) and (chars := batch.token_to_chars(index, last)) and chars.start < stop:
            last += 1
        return first, last
    # Tokens agree with those of the text before a boundary up to the token that merges across it.
    input_ids = batch["input_ids"][index]
    before, after = (
        _common_ids(tokenizer(item.text[:end], add_special_tokens=not is_chat)["input_ids"], input_ids)
        for end in (start, stop)
    )
    return before, after


def _common_ids(first: list[int], second: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _with_special_tokens(tokenizer: Any, input_ids: list[int], mask: list[int]) -> Encoded:
    """Text tokens with one BOS where the tokenizer adds one, and an EOS, which belongs to the response."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and input_ids[:2] == [bos, bos]:
        input_ids, mask = input_ids[1:], mask[1:]
    if eos is not None:
        if input_ids[-1:] == [eos] and len(input_ids) > 1:
            input_ids, mask = input_ids[:-1], mask[:-1]
        input_ids, mask = [*input_ids, eos], [*mask, 1]
    return Encoded(input_ids, mask)
