"""The command line: parse, call one function, turn errors into one sentence and an exit status.

0 done, 1 the work failed, 2 wrong usage, 130 interrupted (and saved).
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from train.compare_config import CompareConfig
from train.config import TrainConfig
from train.interrupt import AlreadyTold, Interrupted


class Command(NamedTuple):
    """One row: `ebb NAME` fills `config` from its flags and calls `function` with it."""

    summary: str
    module: str
    config: str
    function: str


COMMANDS = {
    "demo": Command(
        "train two models on the built-in text, sample from them, compare them",
        "train.demo",
        "DemoConfig",
        "demo",
    ),
    "train": Command(
        "train a model on a text", "train.train_command", "TrainConfig", "train_command"
    ),
    "generate": Command(
        "write text with a trained model", "train.generate", "GenerateConfig", "generate"
    ),
    "eval": Command(
        "loss of a model on a text, and what a longer context is worth",
        "train.eval_command",
        "EvalConfig",
        "evaluate_checkpoint",
    ),
    "compare": Command(
        "train several mixers alike and report on them", "train.compare", "CompareConfig", "compare"
    ),
    "bench": Command(
        "measure speed and memory, next to what the machine can do",
        "train.bench.command",
        "BenchConfig",
        "bench",
    ),
    "convert": Command(
        "import an official RWKV checkpoint, or export a run as one",
        "train.convert",
        "ConvertConfig",
        "convert",
    ),
    "verify": Command(
        "check every form of every mixer against its definition",
        "train.verify.command",
        "VerifyConfig",
        "verify_command",
    ),
    "info": Command(
        "the machine and the mixers, or one checkpoint", "train.info", "InfoConfig", "info"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name. Returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        sys.stdout.write(f"ebb {importlib.metadata.version('ebb-lm')}\n")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; choose one of {', '.join(COMMANDS)}", 2)
    world = os.environ.get("WORLD_SIZE", "1")
    if name != "train" and world != "1":
        if os.environ.get("RANK", "0") != "0":
            return 2
        return _fail(f"only `ebb train` runs in {world} processes: start `ebb {name}` alone", 2)
    status = _told(name, rest)
    if world != "1":
        from train.together import leave_group  # loads torch, which the overview can do without

        leave_group()
    return status


def _told(name: str, args: Sequence[str]) -> int:
    """One command, its errors in a sentence; the exit status."""
    try:
        return _run(name, args)
    except Interrupted as stop:
        return _fail(str(stop), 130)
    except AlreadyTold as told:
        return told.status
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return _fail(
            "there is not enough memory: choose a smaller --size, --batch-size or --context", 1
        )


def _run(name: str, args: Sequence[str]) -> int:
    """One command; errors of its work are raised, those of its usage are told."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    try:
        config = _parse(name, getattr(module, command.config), args)
    except SystemExit as stop:  # tyro has printed its help, or what is wrong
        sys.stdout.flush()
        return stop.code if isinstance(stop.code, int) else 2
    except ValueError as error:
        return _fail(str(error), 2)
    getattr(module, command.function)(config)
    sys.stdout.flush()
    return 0


def _parse(name: str, kind: type[Any], args: Sequence[str]) -> Any:
    """The settings in `args`; with `--resume` they start from what the folder was made with.

    Those of `ebb train` start from a recipe or a checkpoint where the flags name one.

    Raises:
        ValueError: for a value that is refused.
    """
    prog = f"ebb {name}"
    options: dict[str, Any] = {}
    if kind is TrainConfig:
        from train.starting import settings_of_flags  # loads torch, which the overview does without

        start = settings_of_flags(args)
        options = {} if start is None else {"default": start}
    config = _from_flags(kind, args=args, prog=prog, **options)
    if isinstance(config, TrainConfig | CompareConfig) and config.resume:
        saved = config.saved()
        if saved is not None:
            before = _settings_before(kind, saved, config.folder)
            config = _from_flags(kind, args=args, prog=prog, default=before)
    return config


def _settings_before(kind: type[Any], saved: dict[str, Any], folder: Path) -> Any:
    """What the folder was made with.

    Raises:
        ValueError: where these are settings that another version of Ebb had.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    why = ", ".join(f"there is no {name}" for name in sorted(set(saved) - names))
    try:
        if not why:
            return kind(**saved, out=folder, resume=True)
    except ValueError as error:
        why = str(error)
    except (TypeError, AttributeError):
        why = "a value is of another kind"
    raise ValueError(
        f"{folder} was made by another version of Ebb, with settings that this one does not take "
        f"({why}): go on with that version, or choose another --out."
    )


def _from_flags(kind: type[Any], **options: Any) -> Any:
    """`tyro.cli`, but for a value that `__post_init__` refuses its own sentence, not tyro's box.

    Raises:
        ValueError: with that sentence.
        SystemExit: when tyro has printed its help or what is wrong.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if isinstance(stop.__context__, ValueError):
            raise stop.__context__ from None
        sys.stderr.write(said.getvalue())
        raise


def _usage() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ebb COMMAND [OPTIONS]",
            "",
            "Language models without softmax: train, prove, generate, compare.",
            "",
            *lines,
            "",
            "`ebb COMMAND --help` lists the options of a command.",
            "",
        ]
    )


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"ebb: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
