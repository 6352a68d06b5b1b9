"""The error that every part of this package raises for what it cannot read."""


class DataError(ValueError):
    """A user's mistake about text or tokens, told in one sentence that says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without a full stop, to put inside a sentence."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__
