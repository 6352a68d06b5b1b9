"""Byte-level vocabularies: the characters that stand for bytes, and the smallest of them."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

END = "<|end|>"


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0 to 255 in byte-level vocabularies.

    Bytes that are printable Latin-1 stand for themselves, the others for U+0100 onwards, in order
    (GPT-2's encoder.py; ``ByteLevel.alphabet`` has the same characters but not the order).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_inner() -> tokenizers.Tokenizer:
    """The definition of the byte tokenizer."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return inner


def is_byte_definition(definition: object) -> bool:
    """Whether this is exactly the byte tokenizer, whose ids can be had without the library."""
    return bool(definition == json.loads(byte_inner().to_str()))
