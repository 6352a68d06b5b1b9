"""Metrics to other places than `metrics.jsonl`, through accelerate's trackers.

`Accelerator.log` then reaches all that were started, from the first process alone.
"""

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from train.config import TrainConfig

PROJECT = "ebb"
"""What the runs stand under; TensorBoard's files are in a folder of this name in the run's."""

_PACKAGES = {"comet_ml": "comet-ml"}
"""Trackers whose package has another name than they."""


def usable_trackers(track: str | None) -> list[str]:
    """Those of the names in `--track` that exist and are installed."""
    return [name for name in _names(track) if _exists(name) and _is_installed(name)]


def check_trackers(track: str | None) -> None:
    """Refuses a tracker that would be passed over.

    Raises:
        ValueError: for one that does not exist or is not installed.
    """
    for name in _names(track):
        if not _exists(name):
            raise ValueError(
                f"there is no tracker {name!r}; choose one of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if not _is_installed(name):
            raise ValueError(
                f"track {name} needs a package that is not installed: "
                f"pip install {_PACKAGES.get(name, name)}"
            )


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Opens them, and tells them the settings of the run."""
    if not accelerator.log_with:
        return
    name = config.folder.name
    settings = {key: value for key, value in config.to_dict().items() if value is not None}
    kwargs = {"wandb": {"name": name, "dir": str(config.folder)}, "trackio": {"name": name}}
    accelerator.init_trackers(PROJECT, settings, kwargs)


def _names(track: str | None) -> list[str]:
    return [name.strip() for name in track.split(",")] if track is not None else []


def _exists(name: str) -> bool:
    return name in LOGGER_TYPE_TO_CLASS


def _is_installed(name: str) -> bool:
    """Whether accelerate has found its package; one that was registered brings its own."""
    return name not in LoggerType.list() or LoggerType(name) in get_available_trackers()
