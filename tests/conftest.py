"""One thread, fixed seeds, and hypothesis drawing the same examples in every run."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ebb", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("ebb")
torch.set_num_threads(1)  # the tensors of the tests are small: more threads only wait


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()  # `--threads` holds for a whole process
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` gives NaN, so that memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
