"""A sample of a model's writing, for a glance while it trains."""

from data.tokenizers import Tokenizer
from model.language_model import LanguageModel


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, *, tokens: int, seed: int, prompt: str = ""
) -> str:
    """Text that the model writes after a prompt, or as the beginning of a document.

    Args:
        model: switched to evaluation mode and back.
        tokenizer: of the model.
        tokens: how many to draw.
        seed: of the draw.
        prompt: what to go on from; it stands first in the result.
    """
    return ""
