"""One run in several real processes, which talk through gloo, is the run of one process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from model_helpers import random_model, random_tokens, small_config
from ranks import ended, free_port, start_ranks, start_training
from runs import PATIENCE, ebb, has_logged, metrics, only_line, wait_for, write_text

from data.loader import Batch
from model.layers import MIXERS
from train.checkpoint import load_checkpoint
from train.context_parallel import check_constant
from train.snapshot import load_snapshot
from train.step import Trainee, checkpoint_blocks, rounds, share

TESTS = Path(__file__).parents[1]
STEPS = 20
TOLERANCE = 1e-5
"""Of every loss, in nats."""


@pytest.fixture(scope="module")
def flags(workshop):
    text = write_text(workshop / "ranks.txt")
    return [
        *("--data", text, "--size", "nano", "--tokenizer", "bytes", "--context", "16"),
        *("--batch-size", "4", "--eval-tokens", "48", "--eval-every", "10", "--threads", "1"),
        # At the rate of the recipe, four times this at that width, rounding grows with the steps.
        *("--ffn-dim", "64", "--learning-rate", "0.001", "--precision", "fp32"),
        *("--log-every", "1", "--save-every", "2", "--sample-every", "0"),
    ]


@pytest.fixture(scope="module")
def alone(workshop, flags):
    """The run in one process."""
    folder = workshop / "alone"
    assert ebb("train", *flags, "--steps", STEPS, "--out", folder) == 0
    return folder


def losses(folder):
    """Of training and of validation, by step."""
    names = ("loss", "validation_loss")
    return {(n, line["step"]): line[n] for line in metrics(folder) for n in names if n in line}


def assert_same_losses(folder, reference):
    found, wanted = losses(folder), losses(reference)
    assert found.keys() == wanted.keys()
    apart = {key: abs(found[key] - wanted[key]) for key in wanted}
    assert max(apart.values()) <= TOLERANCE, apart


def newest_snapshot(folder):
    return max(int(path.name.removeprefix("step-")) for path in folder.glob("resume/step-*"))


def told(processes):
    """The one sentence in which all of them together say what went wrong."""
    return only_line("".join(process.stderr for process in processes))


def test_float64_over_100_steps_with_accumulation(workshop, flags):
    rarely = ["--log-every", 5, "--eval-every", 100, "--save-every", 100]
    run = [*flags, "--steps", 100, "--precision", "fp64", *rarely]
    assert ebb("train", *run, "--out", workshop / "one64") == 0
    launch = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    port = ["--dynamo_backend", "no", "--main_process_port", free_port()]
    command = ["-m", "train.cli", "train", *run, "--accumulate", 2, "--out", workshop / "two64"]
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, launch + port + command)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert launched.returncode == 0, launched
    assert_same_losses(workshop / "two64", workshop / "one64")
    assert len(launched.stdout.splitlines()) == 2, "both processes tell how it ended"
    assert launched.stderr.count("step 100: validation") == 1


def test_four_processes_divide_a_model(workshop, flags, alone):
    """Sharded, with the blocks computed again, and two processes for every sequence."""
    folder = workshop / "four"
    options = ["--shard", "--checkpoint-activations", "--context-parallel", 2]
    rarely = ["--sample-every", 20, "--save-every", 20]
    run = [*flags, *options, "--steps", STEPS, *rarely, "--out", folder]
    processes = ended(start_training(4, *run))
    assert [process.returncode for process in processes] == [0] * 4, processes
    assert_same_losses(folder, alone)
    own, reference = load_checkpoint(folder).model, load_checkpoint(alone).model
    for name, weight in own.state_dict().items():
        assert weight.shape == reference.state_dict()[name].shape, name
    saved, wanted = (load_snapshot(path, pytest.fail).optimizer for path in (folder, alone))
    assert saved["state"].keys() == wanted["state"].keys()
    for index, entry in saved["state"].items():
        assert entry["exp_avg"].shape == wanted["state"][index]["exp_avg"].shape
        assert entry["step"] == STEPS


def test_killed_interrupted_and_resumed_with_other_numbers_of_processes(workshop, flags, alone):
    folder = workshop / "on and off"
    run = [*flags, "--steps", str(STEPS), "--shard", "--out", folder]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    launcher = subprocess.Popen(
        [sys.executable, *launch, "-m", "train.cli", "train", *map(str, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: has_logged(folder, 5), launcher)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(launcher.pid).children()}
    ranks["1"].kill()
    _, error = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0
    sentence = [line for line in error.splitlines() if line.startswith("ebb: ")]
    assert len(sentence) == 1, error
    assert "A process of this run has ended, so all of them stop." in sentence[0]
    assert f"ebb train --resume --out '{folder}'" in sentence[0]
    killed_at = load_snapshot(folder, pytest.fail).step
    assert 0 < killed_at < STEPS

    processes = start_training(4, "--resume", "--out", folder)
    wait_for(lambda: newest_snapshot(folder) > killed_at, processes[0])
    processes[2].send_signal(signal.SIGINT)
    stopped = ended(processes)
    assert [process.returncode for process in stopped] == [130] * 4, stopped
    assert f"of {STEPS}; go on with: ebb train --resume" in told(stopped)
    assert killed_at < load_snapshot(folder, pytest.fail).step < STEPS

    assert ebb("train", "--resume", "--out", folder) == 0
    assert_same_losses(folder, alone)


def test_carried_in_two_processes_and_on_in_one(workshop, flags):
    """Each process has the rows of its parts; divided matrices are made orthogonal whole."""
    run = [*flags, "--carry-state", "--optimizer", "muon", "--steps", STEPS]
    folder, whole = workshop / "carried by two", workshop / "carried"
    assert ebb("train", *run, "--out", whole) == 0
    options = ["--accumulate", 2, "--shard"]
    processes = start_training(2, *run, *options, "--out", folder)
    wait_for(lambda: has_logged(folder, 5), processes[0])
    processes[1].send_signal(signal.SIGINT)
    stopped = ended(processes)
    assert [process.returncode for process in stopped] == [130] * 2, stopped
    assert 0 < load_snapshot(folder, pytest.fail).step < STEPS
    again = ended(start_training(4, "--resume", "--accumulate", 1, "--out", folder))
    assert [process.returncode for process in again] == [0] * 4, again
    assert_same_losses(folder, whole)
    carried, wanted = (load_snapshot(path, pytest.fail).extra for path in (folder, whole))
    assert carried.keys() == wanted.keys()
    for name, tensor in carried.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)


def test_compiled_in_two_processes(workshop, flags, alone):
    """By a compiler that only traces, which takes a second instead of twenty."""
    folder = workshop / "compiled by two"
    run = [*flags, "--compile", "--steps", STEPS, "--out", folder]
    processes = ended(start_ranks(2, TESTS / "traced.py", "train", *run))
    assert [process.returncode for process in processes] == [0] * 2, processes
    assert "cannot be compiled" not in processes[0].stderr
    assert json.loads((folder / "config.json").read_text())["machine"]["compile"] is True
    assert_same_losses(folder, alone)


def test_where_the_first_process_is_gone_the_second_tells(workshop, flags):
    folder = workshop / "headless"
    processes = start_training(2, *flags, "--steps", 200, "--out", folder)
    wait_for(lambda: has_logged(folder, 3), processes[0])
    processes[0].kill()
    first, second = ended(processes)
    assert first.returncode == -signal.SIGKILL
    assert second.returncode == 1, second
    assert "A process of this run has ended" in only_line(second.stderr)
    assert load_snapshot(folder, pytest.fail).step >= 2


def test_a_mistake_is_told_once(workshop, flags, alone):
    """Here, a folder that already holds a run: only the first process looks."""
    processes = ended(start_training(2, *flags, "--out", alone))
    assert [process.returncode for process in processes] == [1, 1], processes
    assert "already holds a run" in told(processes)


def test_no_group_is_left_by_a_command_that_fails(monkeypatch, tmp_path):
    """Its threads would abort the process at the end of the interpreter, in one run of four."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ebb("train", "--size", "none") == 2
    assert not dist.is_initialized()


def test_passed_states_are_those_of_one_process():
    processes = ended(start_ranks(4, TESTS / "stretches.py"))
    assert [process.returncode for process in processes] == [0] * 4, processes
    for process in processes:
        errors = json.loads(process.stdout)
        assert set(errors) == set(MIXERS) - {"attention"}
        assert max(errors.values()) <= 1e-9, errors


def test_only_a_state_of_constant_size_can_be_passed_on():
    for mixer in MIXERS:
        state = random_model(small_config(mixer)).initial_state(1)
        if mixer == "attention":
            with pytest.raises(ValueError, match="that of attention grows with the tokens"):
                check_constant(state, mixer)
        else:
            check_constant(state, mixer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard"], "shard divides the model among processes, but there is one"),
        (["--context-parallel", "2"], "needs a multiple of 2 processes, but there are 1"),
        (["--carry-state", "--context-parallel", "2"], "carry-state and context-parallel both"),
        (["--compile", "--checkpoint-activations"], "compile works without shard"),
        (["--accumulate", "3"], "cannot be divided into 3 parts (1 processes x accumulate 3)"),
    ],
)
def test_what_has_no_effect_or_cannot_be_divided_is_refused(flags, tmp_path, capsys, options, said):
    assert ebb("train", *flags, *options, "--out", tmp_path / "run") == 1
    assert said in only_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_only_training_runs_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ebb("compare", "--mixers", "rwkv7,attention") == 2
    assert "only `ebb train` runs in 2 processes" in only_line(capsys.readouterr().err)


def test_shares_are_all_of_a_batch_and_borders_have_their_targets():
    tokens = random_tokens(4, 13)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 3)
    cpu = torch.device("cpu")
    rows = [
        [share(batch, rows=(row, 2), stretch=(s, 3), device=cpu) for s in range(3)]
        for row in range(2)
    ]
    for field in range(3):
        parts = [torch.cat([part[field] for part in row], dim=1) for row in rows]
        assert torch.equal(torch.cat(parts), batch[field])
    assert torch.equal(rows[0][0].targets[:, -1], rows[0][1].inputs[:, 0])


def test_batches_are_dealt_out_equally_often_and_count_once():
    dealt = [list(rounds(iter("abcde"), group, 3)) for group in range(3)]
    assert [len(rounds_of_one) for rounds_of_one in dealt] == [2, 2, 2]
    counted = [batch for own in dealt for batch, counts in own if counts]
    assert sorted(counted) == list("abcde")


def test_checkpointed_blocks_keep_less_and_compute_the_same():
    tokens = random_tokens(2, 24)
    found = []
    for again in (False, True):
        model = random_model(small_config("rwkv7"))
        if again:
            checkpoint_blocks(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            loss = Trainee(model, with_state=False)(tokens[:, :-1], tokens[:, 1:], None)
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()], sum(kept)))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = found
    assert torch.equal(loss, loss_again)
    assert all(map(torch.equal, gradients, gradients_again))
    assert kept_again < kept / 4


def test_accumulation_in_one_process_is_the_whole_batch(tmp_path, flags, alone):
    run = [*flags, "--steps", STEPS, "--accumulate", 4, "--save-every", STEPS]
    assert ebb("train", *run, "--out", tmp_path / "run") == 0
    assert_same_losses(tmp_path / "run", alone)
