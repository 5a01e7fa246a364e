"""Words: messages become ids, and what each id is becomes a mask.

One function, ``encode_messages``, renders a prompt: the chat template is applied once and its text
is tokenised once. What a user typed is text: a control token or ``<image>`` in it is encoded as the
characters it is made of. Pictures come from parts of type image and video alone.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from threading import Lock
from typing import Any, Literal, cast

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Kind = Literal["image", "video"]

MARKS: dict[Kind, str] = {"image": "<image>", "video": "<video>"}
"""What stands for a medium in a rendered prompt."""

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "video", "image_url")

_RENDERING = Lock()
"""transformers keeps one compiled template for the whole process, which notes inside itself where answers are."""

Message = Mapping[str, Any]

TEMPLATES = ("vicuna_v1", "llava_v1", "llama_3_1", "chatml", "tiny", "plain")
"""Chat templates by name. ``llava_v1`` says "human" where ``vicuna_v1`` says "user"; ``chatml`` is that of Qwen and
SmolLM2; ``plain`` is the caption format of stage 1."""


def load_template(name: str) -> str:
    """The chat template called ``name``, in Jinja.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if name not in TEMPLATES:
        raise ValueError(f"There is no chat template {name!r}. The templates are: {', '.join(TEMPLATES)}.")
    return (files("llava_mini.processor") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def marks_answers(template: str) -> bool:
    """Whether a chat template in Jinja says where answers are, which training needs."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a medium in a prompt."""

    kind: Kind
    source: Any
    """What is to be seen there. None: given apart."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in ids, with one id for each medium. All three have length T."""

    ids: tuple[int, ...]
    """The id at a medium is 0 and means nothing."""
    media_mask: tuple[bool, ...]
    """True at media."""
    answer_mask: tuple[bool, ...]
    """True at what the assistant wrote, its end token included."""
    kinds: tuple[Kind, ...]
    """Of the media, in order."""


@dataclass(frozen=True, kw_only=True)
class CheckedMessages:
    """A conversation that can be rendered."""

    messages: tuple[dict[str, Any], ...]
    """Role and parts; each part has a known type and a value."""
    slots: tuple[Slot, ...]
    """The media in order."""

    @cached_property
    def texts(self) -> str:
        """Everything that was typed."""
        return "".join(
            part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"
        )


def check_messages(conversation: Sequence[Message]) -> CheckedMessages:
    """Check a conversation in the chat format of transformers.

    Raises:
        ValueError: an unknown role or part, missing content, or a question without words.
    """
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence) or not conversation:
        raise ValueError(
            "A conversation is a list of messages like {'role': 'user', 'content': [{'type': 'text', 'text': ...}]}; "
            f"got {type(conversation).__name__ if conversation else 'an empty one'}."
        )
    messages = [_check_message(message) for message in conversation]
    parts = [part for message in messages for part in message["content"]]
    slots = [Slot(kind=part["type"], source=part["source"]) for part in parts if part["type"] != "text"]
    return CheckedMessages(messages=tuple(messages), slots=tuple(slots))


def _check_message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"A message is a dictionary with role and content; got {type(message).__name__}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"A message has the role {role!r}; the roles are {', '.join(ROLES)}.")
    if content is None:
        raise ValueError(f"A message of the {role} has no content. Give a string or a list of parts.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(f"The content of a message is a string or a list of parts; got {type(content).__name__}.")
    parts = [_check_part(part) for part in content]
    if role != "user" and any(part["type"] != "text" for part in parts):
        raise ValueError(f"A message of the {role} holds an image or a video. Put it into a message of the user.")
    if role == "user" and not parts:
        raise ValueError("A message of the user is empty. Give a question.")
    return {"role": role, "content": parts}


def _check_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        raise ValueError(
            f"A message holds a part of type {kind!r}; the types are {', '.join(PART_TYPES)}. Write parts as "
            "{'type': 'image', 'image': ...}."
        )
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"A text part holds {type(part.get('text')).__name__} instead of a string under 'text'.")
        require_unicode(part["text"])
    keys = {
        "text": ("text",),
        "image": ("image", "url", "path"),
        "video": ("video", "url", "path"),
        "image_url": ("image_url",),
    }[kind]
    unknown = set(part) - {"type", *keys}
    if unknown:
        raise ValueError(f"A part of type {kind} has the unknown key {min(unknown)!r}; it can have {', '.join(keys)}.")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    given = [part[key] for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"A part of type {kind} names {len(given)} sources. Give one of {', '.join(keys)}.")
    source = given[0] if given else None
    if kind == "image_url":
        kind, source = "image", source.get("url") if isinstance(source, Mapping) else source
    return {"type": kind, "source": source}


def require_unicode(text: str) -> None:
    """Refuse text that no tokenizer can read.

    Raises:
        ValueError: it holds bytes that were not UTF-8 when it was typed.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text {text[:40]!r} holds bytes that are not UTF-8. Is the terminal or the file in another encoding?"
        ) from error


def require_question(conversation: CheckedMessages) -> None:
    """Refuse to answer a question without words.

    Raises:
        ValueError: the last message is the user's and holds no text.
    """
    last = conversation.messages[-1]
    words = "".join(part["text"] for part in last["content"] if part["type"] == "text")
    if last["role"] == "user" and not words.strip():
        raise ValueError("The question is empty. Ask something about the image or video in a text part.")


def render(
    conversation: CheckedMessages,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    guard: str = "",
) -> tuple[str, list[tuple[int, int]]]:
    """Apply the chat template.

    Args:
        conversation: the messages.
        tokenizer: its control tokens are known to the template, and looked for in the text.
        template: in Jinja; sees messages whose content is a string, with a mark for each medium.
        add_generation_prompt: whether the header of an answer follows.
        continue_final_message: whether the last message goes on, without its end.
        guard: a character that is put before and after control tokens and marks that were typed.

    Returns:
        The text, and where in it answers begin and end.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude one another. Give one of them.")
    typed = _control_strings(tokenizer)
    messages = [
        {"role": message["role"], "content": _layout(message["content"], typed, guard)}
        for message in conversation.messages
    ]
    answers = any(message["role"] == "assistant" for message in messages)
    if answers and not marks_answers(template):
        raise ValueError(
            "The chat template does not say where answers are. Put {% generation %} and {% endgeneration %} around the "
            "assistant's text in it, or use one of the templates of llava_mini."
        )
    known: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        with _RENDERING:
            rendered, spans = cast(
                tuple[list[str], list[list[tuple[int, int]]]],
                render_jinja_template(
                    conversations=[messages],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    continue_final_message=continue_final_message,
                    add_generation_prompt=add_generation_prompt,
                    **known,
                ),
            )
    except TemplateError as error:
        raise ValueError(f"The chat template refuses the conversation: {error}") from error
    return rendered[0], [(start, min(end, len(rendered[0]))) for start, end in spans[0]] if answers else []


def _control_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Everything that would not be read as ordinary characters, longest first."""
    strings = {*MARKS.values(), *_added_tokens(tokenizer)}
    return re.compile("|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True)))


def _layout(parts: Sequence[dict[str, Any]], typed: re.Pattern[str], guard: str) -> str:
    """A message's content in one string: a mark for each medium, a newline between a medium and text after it."""
    pieces: list[str] = []
    for is_text, run in itertools.groupby(parts, key=lambda part: part["type"] == "text"):
        if is_text:
            text = "".join(part["text"] for part in run)
            guarded = typed.sub(lambda match: f"{guard}{match[0]}{guard}", text)
            pieces.append(f"\n{guarded}" if pieces else guarded)
        else:
            pieces += [MARKS[part["type"]] for part in run]
    return "".join(pieces)


def encode_messages(
    conversation: CheckedMessages,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    num_begin_tokens: int,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> Prompt:
    """Render a conversation and tokenise it.

    Args:
        conversation: the messages.
        tokenizer: a fast one.
        template: the chat template, in Jinja.
        num_begin_tokens: how many begin-of-text tokens the prompt starts with.
        add_generation_prompt: whether the header of an answer follows.
        continue_final_message: whether the last message goes on, without its end.

    Raises:
        ValueError: the template does not show every medium, or does not mark answers.
    """
    guard = _unused_character(conversation.texts)
    text, answers = render(
        conversation,
        tokenizer,
        template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        guard=guard,
    )
    prompt = encode_text(text, tokenizer, num_begin_tokens=num_begin_tokens, answers=answers, guard=guard)
    if prompt.kinds != tuple(slot.kind for slot in conversation.slots):
        raise ValueError(
            f"The messages hold {len(conversation.slots)} images and videos, but the chat template shows "
            f"{len(prompt.kinds)} of them. Does it drop a message, or write marks of its own?"
        )
    return prompt


def _unused_character(text: str) -> str:
    """A noncharacter of Unicode that does not occur in the text."""
    planes = (chr(plane * 0x10000 + last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    return next(character for character in planes if character not in text)


def encode_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_begin_tokens: int | None,
    answers: Sequence[tuple[int, int]] = (),
    guard: str = "",
) -> Prompt:
    """Tokenise a prompt: each stretch between two media on its own, as the released code does.

    Args:
        text: with marks for media; control tokens are control tokens, unless guarded.
        tokenizer: a fast one.
        num_begin_tokens: how many begin-of-text tokens the prompt starts with, whatever the text
            begins with. None: as many as the text has.
        answers: where answers begin and end, in characters.
        guard: the character around strings that were typed.
    """
    marks: dict[str, Kind] = {mark: kind for kind, mark in MARKS.items()}
    found = re.split(f"({'|'.join(map(re.escape, marks))})", _hide_guarded(text, guard))
    ids: list[int] = []
    media: list[bool] = []
    answered: list[bool] = []
    kinds: list[Kind] = []
    position = 0
    for index, piece in enumerate(found):
        piece = text[position : position + len(piece)]
        if index % 2:
            kinds.append(marks[piece])
            ids, media, answered = [*ids, 0], [*media, True], [*answered, False]
        else:
            for token, start, end in _encode_stretch(piece, tokenizer, guard):
                ids.append(token)
                media.append(False)
                answered.append(any(position + start < stop and position + end > begin for begin, stop in answers))
        position += len(piece)
    begin = tokenizer.bos_token_id
    if num_begin_tokens is not None and isinstance(begin, int):
        num_found = next((i for i, token in enumerate(ids) if token != begin or media[i]), len(ids))
        ids = [begin] * num_begin_tokens + ids[num_found:]
        media = [False] * num_begin_tokens + media[num_found:]
        answered = [False] * num_begin_tokens + answered[num_found:]
    return Prompt(ids=tuple(ids), media_mask=tuple(media), answer_mask=tuple(answered), kinds=tuple(kinds))


def _hide_guarded(text: str, guard: str) -> str:
    """The text with guarded strings blanked, in the same length."""
    if not guard:
        return text
    return re.sub(f"{guard}[^{guard}]*{guard}", lambda match: " " * len(match[0]), text)


Token = tuple[int, int, int]
"""Id, and where its characters begin and end."""


def _encode_stretch(text: str, tokenizer: PreTrainedTokenizerBase, guard: str) -> list[Token]:
    """Tokenise text between two media; strings between guards as ordinary characters, without the guards.

    SentencePiece puts a space before every text; the fast tokenizer leaves it out when there is one already, so
    that one is added here.
    """
    if not text:
        return []
    lead = " " if text.startswith(" ") and _ids(tokenizer, "a") == _ids(tokenizer, " a") else ""
    if guard and guard in text:
        tokens = _encode_guarded(lead, text, tokenizer, guard)
    else:
        encoded = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = [(token, *span) for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    shift = len(lead)
    return [(token, max(start - shift, 0), max(end - shift, 1)) for token, start, end in tokens]


def _encode_guarded(lead: str, text: str, tokenizer: PreTrainedTokenizerBase, guard: str) -> list[Token]:
    """Tokenise with control tokens renamed to what nobody can type, so that those in ``text`` are only letters."""
    renamed, ids = _with_renamed_controls(tokenizer, guard, len(tokenizer))
    controls = re.compile("|".join(map(re.escape, sorted(_added_tokens(tokenizer), key=len, reverse=True))) or "(?!)")
    characters, origins = list(lead), list(range(len(lead)))
    position = 0

    def copy(end: int) -> None:
        for index in range(position, end):
            if text[index] != guard:
                characters.append(text[index])
                origins.append(index + len(lead))

    for match in controls.finditer(_hide_guarded(text, guard)):
        copy(match.start())
        characters += [guard, *match[0], guard]
        origins += [index + len(lead) for index in (match.start(), *range(*match.span()), match.end() - 1)]
        position = match.end()
    copy(len(text))
    encoded = renamed.encode("".join(characters), add_special_tokens=False)
    return [
        (ids.get(token, token), origins[start] if start < len(origins) else 0, origins[end - 1] + 1 if end else 0)
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)
    ]


@lru_cache(maxsize=4)
def _with_renamed_controls(
    tokenizer: PreTrainedTokenizerBase, guard: str, size: int
) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with guards around the names of its control tokens, and the ids it should give them."""
    spec = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    for token in spec["added_tokens"]:
        token["content"] = f"{guard}{token['content']}{guard}"
    renamed = Tokenizer.from_str(json.dumps(spec))
    added = _added_tokens(tokenizer).items()
    return renamed, {cast(int, renamed.token_to_id(f"{guard}{name}{guard}")): token for name, token in added}


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return cast(Any, tokenizer).get_added_vocab()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
