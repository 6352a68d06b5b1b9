"""The rooms of the house: which may import which, and what they may be called.

Every check is a function of plain values (a source text, a list of paths) that is also given a
planted violation, so that it is known to be able to fail.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"model", "train", "data", "tests", "checkpoints"}
PACKAGES = ("model", "train", "data")

MAY_IMPORT = {
    "model.config": {"model.config"},
    "model.state": {"model.state"},
    "model.ops": {"model.ops"},
    "model.layers": {"model.layers", "model.ops", "model.config", "model.state"},
    "model": {"model"},
    "data": {"data"},
    "train.cli": {"train", "model", "data"},
    "train": {"train", "model", "data"},
}
"""For a module, the longest prefix here counts; what it may import of the three packages."""
MAY_NOT_IMPORT = {"train": {"train.cli"}}
"""Exceptions to the above. `train.cli` has a row of its own there and is not meant."""


def module_name(path: PurePosixPath) -> str:
    """`model/ops/__init__.py` -> `model.ops`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    return max((room for room in MAY_IMPORT if is_within(module, room)), key=len)


def imports(source: str, path: PurePosixPath) -> Iterator[str]:
    """All modules that a source text imports, wherever the import stands, and however."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            named = node.args[0]
            if called in ("import_module", "importlib.import_module", "__import__") and isinstance(
                named, ast.Constant
            ):
                yield str(named.value)


def forbidden_imports(source: str, path: str) -> set[str]:
    """What a file of one of the packages imports and may not."""
    where = PurePosixPath(path)
    room = room_of(module_name(where))
    return {
        module
        for module in imports(source, where)
        if module.partition(".")[0] in (*PACKAGES, "tests", "helpers", "model_helpers")
        and (
            not any(is_within(module, allowed) for allowed in MAY_IMPORT[room])
            or any(is_within(module, banned) for banned in MAY_NOT_IMPORT.get(room, ()))
        )
    }


def shadowing_names(paths: Iterable[str]) -> set[str]:
    """Files and folders whose names would hide a package, or make tests a package."""
    found = set()
    for path in map(PurePosixPath, paths):
        if path.name in ("model.py", "train.py", "data.py", "datasets.py"):
            found.add(str(path))
        if path.parts[0] == "tests" and (
            path.name == "__init__.py"
            or {"model", "train", "data", "datasets"} & set(path.parts[1:-1])
        ):
            found.add(str(path))
    return found


def foreign_folders(names: Iterable[str]) -> set[str]:
    """Top-level folders that are no room; what tools leave behind is none of ours."""
    left_behind = {"build", "dist", "__pycache__"}
    return {
        name
        for name in set(names) - ROOMS - left_behind
        if not name.startswith(".") and not name.endswith(".egg-info")
    }


def python_files(*folders: str) -> list[str]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.mark.parametrize("path", python_files(*PACKAGES))
def test_arrows_point_one_way(path):
    assert forbidden_imports((ROOT / path).read_text(encoding="utf-8"), path) == set()


def test_the_walk_sees_the_house():
    """Were the files not found, the test above would pass without looking at anything."""
    files = python_files(*PACKAGES)
    for room in ("model/ops/delta.py", "model/layers/rwkv7.py", "model/language_model.py"):
        assert room in files
    assert any(path.startswith("data/") for path in files)
    assert any(path.startswith("train/") for path in files)
    source = (ROOT / "model/layers/rwkv7.py").read_text(encoding="utf-8")
    assert "model.layers.layer.Context" in imports(source, PurePosixPath("model/layers/rwkv7.py"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/ops/delta.py", "from model.layers.norm import HeadNorm"),
        ("model/ops/delta.py", "from model.config import ModelConfig"),
        ("model/ops/delta.py", "import model.state"),
        ("model/ops/delta.py", "import model"),
        ("model/ops/delta.py", "from model import layers"),
        ("model/ops/delta.py", "from .. import layers"),
        ("model/ops/delta.py", "from ..layers import MIXERS"),
        ("model/ops/__init__.py", "from ..layers import MIXERS"),
        ("model/ops/native/__init__.py", "from ...config import ModelConfig"),
        ("model/ops/delta.py", "def f():\n    from model.layers import MIXERS"),
        (
            "model/ops/delta.py",
            "if True:\n    import importlib\n    importlib.import_module('train')",
        ),
        ("model/layers/norm.py", "from model.language_model import LanguageModel"),
        ("model/layers/norm.py", "from model import initialization"),
        ("model/layers/__init__.py", "import model.generation as generation"),
        ("model/config.py", "from model.layers import MIXERS"),
        ("model/state.py", "from model.language_model import LanguageModel"),
        ("model/language_model.py", "import data"),
        ("model/language_model.py", "from data.loader import Loader"),
        ("model/language_model.py", "from train import config"),
        ("model/generation.py", "import os, train.checkpoint"),
        ("data/loader.py", "from model.config import ModelConfig"),
        ("data/loader.py", "from train.config import TrainConfig"),
        ("data/corpora/__init__.py", "from ...model import state"),
        ("train/loop.py", "from train.cli import main"),
        ("train/loop.py", "from train import cli"),
        ("train/loop.py", "from .cli import main"),
        ("train/__init__.py", "from . import cli"),
        ("train/loop.py", "from tests.helpers import make_inputs"),
        ("train/loop.py", "from helpers import make_inputs"),
    ],
)
def test_a_planted_import_is_found(path, source):
    assert forbidden_imports(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/ops/delta.py", "import torch\nfrom model.ops.decay import decayed"),
        ("model/ops/delta.py", "from . import decay\nfrom .decay import decayed"),
        ("model/layers/norm.py", "from model.ops import OPS\nfrom model.state import NoState"),
        ("model/language_model.py", "from model.layers import MIXERS\nimport modelling"),
        ("train/cli.py", "from train.loop import train\nfrom data.loader import Loader"),
        ("train/loop.py", "from model.state import save\nfrom train.client import x"),
        ("data/loader.py", "import datasets\nfrom data import packing"),
    ],
)
def test_an_import_that_is_allowed_is_not_reported(path, source):
    assert forbidden_imports(source, path) == set()


def test_no_name_shadows_a_package():
    assert shadowing_names(python_files(*PACKAGES, "tests")) == set()


@pytest.mark.parametrize(
    "path",
    [
        "tests/model/test_x.py",
        "tests/train/test_x.py",
        "tests/data/deep/test_x.py",
        "tests/layers/datasets/test_x.py",
        "tests/ops/__init__.py",
        "model/model.py",
        "train/train.py",
        "data/corpora/data.py",
        "tests/model.py",
        "train.py",
    ],
)
def test_a_planted_name_is_found(path):
    assert shadowing_names(["model/config.py", path]) == {path}


def test_top_level_folders_are_the_fixed_ones():
    folders = [path.name for path in ROOT.iterdir() if path.is_dir()]
    assert {"model", "train", "data", "tests"} <= set(folders)
    own = [name for name in folders if not (ROOT / name / "pyvenv.cfg").exists()]
    assert foreign_folders(own) == set()


def test_a_planted_folder_is_found():
    given = [*ROOMS, ".git", ".github", "ebb_lm.egg-info", "scripts", "src"]
    assert foreign_folders(given) == {"scripts", "src"}
