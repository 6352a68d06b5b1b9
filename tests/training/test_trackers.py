"""`--track`: the lines of `metrics.jsonl` at accelerate's trackers too."""

import pytest
from accelerate import tracking
from runs import TINY, ebb, metrics, only_line, write_text


class Notes(tracking.GeneralTracker):
    """The least that accelerate takes for a tracker."""

    name = "notes"
    requires_logging_directory = False
    lines: list = []  # noqa: RUF012
    settings: dict = {}  # noqa: RUF012

    def __init__(self, run_name, **kwargs):
        super().__init__()

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.settings.update(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.txt")
    return ["--data", text, *TINY, "--steps", "3", "--log-every", "1", "--out", tmp_path / "run"]


def test_a_tracker_is_sent_what_the_file_holds(run, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    assert ebb("train", *run, "--track", "notes") == 0
    assert [line for _, line in Notes.lines] == metrics(tmp_path / "run")
    assert [step for step, _ in Notes.lines] == [line["step"] for line in metrics(tmp_path / "run")]
    assert Notes.settings["mixer"] == "rwkv7"


@pytest.mark.filterwarnings("default::DeprecationWarning")  # TensorBoard's own
def test_tensorboard_reads_the_losses(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert ebb("train", *run, "--track", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "ebb"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    wanted = {line["step"]: line["loss"] for line in metrics(tmp_path / "run") if "loss" in line}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_missing_package_and_an_unknown_name_are_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.trackers.get_available_trackers", list)
    assert ebb("train", *run, "--track", "wandb") == 1
    said = only_line(capsys.readouterr().err)
    assert said == "track wandb needs a package that is not installed: pip install wandb"
    assert ebb("train", *run, "--track", "tensorbored") == 1
    assert "there is no tracker 'tensorbored'; choose one of aim" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
