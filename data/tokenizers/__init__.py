"""Text to token ids and back: bytes, byte-level BPE, RWKV's World, and any ``tokenizer.json``."""

from data.tokenizers.byte_level import END
from data.tokenizers.cut import pieces
from data.tokenizers.load import byte_tokenizer, load_tokenizer, train_bpe
from data.tokenizers.tokenizer import TextStream, Tokenizer

__all__ = [
    "END",
    "TextStream",
    "Tokenizer",
    "byte_tokenizer",
    "load_tokenizer",
    "pieces",
    "train_bpe",
]
