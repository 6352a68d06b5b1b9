"""A sample of a model's writing, for a glance while it trains and for reports."""

from data.tokenizers import Tokenizer
from model import decode
from model.generation import generate
from model.language_model import LanguageModel
from model.sampling import Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.95)


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, *, tokens: int, seed: int, prompt: str
) -> str:
    """Text that the model writes after a prompt.

    Args:
        model: switched to evaluation mode and back.
        tokenizer: of the model.
        tokens: how many to draw at most; a document that ends sooner is not followed by another.
        seed: of the draw.
        prompt: what to go on from, not empty; it stands first in the result.
    """
    was_training = model.training
    model.eval()
    stream, text = tokenizer.stream(), prompt
    drawn = generate(
        model,
        [tokenizer.encode(prompt)],
        max_tokens=tokens,
        sampling=SAMPLING,
        seed=seed,
        stop_ids=[tokenizer.end_id],
    )
    for (token,) in drawn:
        assert token is not None
        text += stream.push(token)
    decode.forget(model)
    model.train(was_training)
    return text + stream.finish()
