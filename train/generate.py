"""`ebb generate`: text in, text out as it is made."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from model.decode import check_weights
from model.sampling import Sampling
from train.interrupt import Interrupted
from train.session import Session


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with a trained model, as it is made.

    The prompt goes through the chunked form, then every token takes one step; with every mixer but
    attention the step's work and memory are the same at any position. The text ends after --tokens
    tokens, at a stop string, or where the model ends the document. It goes to standard output,
    everything else to standard error.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a run, as `ebb train` writes it."""
    prompt: str | None = None
    """Text to go on from. If not given, it is read from standard input where that is not a terminal
    (less a newline at its very end). Without any, a new document begins, or the loaded one goes
    on."""
    echo: bool = True
    """Print the prompt first, so that the text reads as a whole."""
    tokens: int = 256
    """Tokens to generate at most; 0 only reads the prompt, for --save-state."""
    temperature: float = 0.8
    """Above 1 bolder, below 1 more cautious, 0 always the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens that hold this much probability, such as 0.9."""
    min_p: float | None = None
    """Leave out tokens below this fraction of the likeliest one's probability, such as 0.05."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there before less likely, such as 1.2."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End before this string, which is not printed; may be given several times."""
    seed: int | None = None
    """Of the draws; 0 if not given, or where a loaded text's own draws were."""
    interactive: bool = False
    """Read a line, go on from it, and so on, all in one text, until end of file or Ctrl-C. A line
    is added as it was typed, without its newline; an empty one lets the model go on."""
    save_state: Path | None = None
    """File to write the state to at the end or on Ctrl-C: all that it takes to go on from here."""
    load_state: Path | None = None
    """File to go on from, without reading its text again. It fits only the weights it was made
    with."""
    stats: bool = False
    """Report tokens per second and the size of the state."""
    best: bool = False
    """Use the weights with the lowest validation loss instead of the last."""
    weights: str = "fp32"
    """What the matrices are kept in to write: fp32, bf16, int8 or int4. Fewer bits are faster;
    `ebb eval --weights` tells what they cost. The prompt is read in full precision."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""

    def __post_init__(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ValueError: naming the setting.
        """
        if self.tokens < 0:
            raise ValueError(f"tokens must be at least 0, but is {self.tokens}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, but is {self.threads}")
        if self.seed is not None and not 0 <= self.seed < 1 << 62:
            raise ValueError(f"seed must be between 0 and 2^62, but is {self.seed}")
        check_weights(self.weights)
        if "" in self.stop:
            raise ValueError("stop must not be empty: give the string to stop at")
        if self.save_state is not None and not self.save_state.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {self.save_state.parent} to save the state in")
        assert self.sampling  # checks the rest

    @property
    def sampling(self) -> Sampling:
        """How to draw."""
        return Sampling(
            self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p
        )


def generate(config: GenerateConfig) -> None:
    """Writes text to standard output.

    Raises:
        ValueError: if checkpoint, state or prompt cannot be used, in one sentence.
        Interrupted: on Ctrl-C, after saving the state if that was asked for.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it lacks must not end the text
        sys.stdout.reconfigure(errors="replace")
    session = Session(
        config.checkpoint,
        best=config.best,
        state=config.load_state,
        seed=config.seed,
        weights=config.weights,
    )
    stopped: BaseException | None = None
    try:
        (_converse if config.interactive else _complete)(session, config)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        stopped = error
    saved = config.save_state is not None and not session.is_empty
    if config.save_state is not None and saved:
        session.save(config.save_state)
    if config.stats:
        sys.stderr.write("".join(f"{line}\n" for line in session.stats.lines()))
    if isinstance(stopped, KeyboardInterrupt):
        how = f" `--load-state {config.save_state}` goes on from here." if saved else ""
        raise Interrupted(f"Interrupted.{how}")
    if stopped is not None:
        raise stopped


def _complete(session: Session, config: GenerateConfig) -> None:
    """One prompt, one text."""
    prompt = config.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else _from_stdin(sys.stdin.read).removesuffix("\n")
    _begin(session, config, prompt)
    if sys.stdout.isatty():
        _print("\n")


def _converse(session: Session, config: GenerateConfig) -> None:
    """Line by line until end of file."""
    if config.prompt is not None:
        _begin(session, config, config.prompt)
        _print("\n")
    while line := _next_line():
        session.read(session.encode(line.removesuffix("\n")))
        _write(session, config)
        _print("\n")


def _begin(session: Session, config: GenerateConfig, prompt: str) -> None:
    ids = session.encode(prompt)
    if config.echo:
        _print(prompt)
    session.read(ids)
    _write(session, config)


def _write(session: Session, config: GenerateConfig) -> None:
    session.write(
        _print,
        max_tokens=config.tokens,
        sampling=config.sampling,
        stop=config.stop,
        to_be_continued=config.save_state is not None and not config.interactive,
    )


def _next_line() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return _from_stdin(sys.stdin.readline)


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text: convert it first") from None


def _print(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
