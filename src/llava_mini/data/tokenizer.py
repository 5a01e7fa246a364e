"""Making a small tokenizer from text: byte-level, so that anything a user types can be encoded."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, USER, ASSISTANT)
"""Control tokens; their ids are 0 to 4 in this order."""


def build_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary in which every common word is one token.

    Digits are tokens of their own. A word has one id at the start of a text and another after a space.

    Args:
        texts: What to learn from.
        vocab_size: Most entries, the control tokens and 256 bytes included.

    Raises:
        ValueError: If the size leaves no room for bytes and control tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"A byte-level vocabulary needs at least {least} entries, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_control_tokens(tokenizer)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a tokenizer from ``build_tokenizer`` as one JSON file."""
    tokenizer.backend_tokenizer.save(str(path))


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that ``write_tokenizer`` wrote."""
    return _with_control_tokens(Tokenizer.from_file(str(path)))


def _with_control_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
