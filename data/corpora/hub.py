"""Data sets of the ``datasets`` library: saved in a folder, or by their name on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.base import Corpus, Documents, make_corpus, split_by_hash
from data.corpora.tables import check_text, missing_column
from data.corpora.text import own_split_message
from data.errors import DataError, first_line

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path, column: str, validation_fraction: float) -> Corpus:
    """Load what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The data set in '{folder}' cannot be read ({first_line(error)}): save it again."
        ) from error
    return _to_corpus(folder.resolve().name, loaded, column, validation_fraction)


def load_hub(
    source: str, column: str, validation_fraction: float, stream: int | None = None
) -> Corpus:
    """Load ``org/name``, ``org/name:config``, ``org/name:config:split`` or ``org/name::split``.

    With ``stream`` only the first documents of each split, as they come, without what follows. They
    are kept in the cache of ``datasets``: asked for again, they are read from there.
    """
    import datasets

    name, config, split = (*source.split(":"), "", "")[:3]
    chosen = {"path": name, "name": config or None, "split": split or None}
    try:
        if stream is None:
            loaded = datasets.load_dataset(**chosen)
        else:
            loaded = _first_rows(source, chosen, column, stream)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(mistake := error.__cause__ or error, DataError):
            raise mistake from None  # about the column, met while the rows came
        raise DataError(
            f"'{source}' is no file or folder here, and the data set of that name could not be "
            f"loaded from the Hugging Face hub ({first_line(error)}): check the name and the "
            "connection, or give a path."
        ) from error
    return _to_corpus(source, loaded, column, validation_fraction)


def _first_rows(source: str, chosen: dict[str, Any], column: str, count: int) -> Any:
    """The first rows of a split, or of training and validation, as a data set of one column."""
    import datasets

    def first(split: str) -> Any:
        return datasets.Dataset.from_generator(
            _texts,
            # Large: more than 2 GB of text fit. The names of all this are those of its cache.
            features=datasets.Features({column: datasets.Value("large_string")}),
            gen_kwargs={
                "source": source,
                "chosen": chosen | {"split": split},
                "column": column,
                "count": count,
            },
        )

    if chosen["split"]:
        return first(chosen["split"])
    name = chosen["name"]
    splits = datasets.get_dataset_split_names(chosen["path"], name)
    wanted = [side for side in ("train", *_VALIDATION_NAMES) if side in splits]
    return {split: first(split) for split in (wanted or splits)}


def _texts(
    source: str, chosen: dict[str, Any], column: str, count: int
) -> Iterator[dict[str, str]]:
    """The rows, with nothing but the column."""
    import datasets

    for row in datasets.load_dataset(**chosen, streaming=True).take(count):
        if column not in row:
            raise missing_column(column, f"'{source}'", row)
        yield {column: check_text(row[column], column, f"'{source}'")}


def _to_corpus(name: str, loaded: Any, column: str, validation_fraction: float) -> Corpus:
    """Use the splits of a ``DatasetDict`` if it has both, else divide its only or training one."""
    if not isinstance(loaded, dict):
        return split_by_hash(name, _documents(name, loaded, column), validation_fraction)
    validation = next((loaded[side] for side in _VALIDATION_NAMES if side in loaded), None)
    if "train" in loaded and validation is not None:
        if validation_fraction != 0.1:
            raise DataError(own_split_message(name))
        return make_corpus(
            name, _documents(name, loaded["train"], column), _documents(name, validation, column)
        )
    if "train" not in loaded and len(loaded) != 1:
        raise DataError(
            f"'{name}' has no split called train: choose one of {', '.join(loaded) or 'none'}, "
            "as 'org/name:config:split' on the hub, or by the folder of that split on disk."
        )
    only = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return split_by_hash(name, _documents(name, only, column), validation_fraction)


def _documents(name: str, dataset: Any, column: str) -> Documents:
    if column not in dataset.column_names:
        raise missing_column(column, f"'{name}'", dataset.column_names)
    rows = dataset.select_columns([column]).with_format(None)

    def read() -> Iterator[str]:
        for batch in rows.iter(batch_size=1024):
            for value in batch[column]:
                yield check_text(value, column, f"'{name}'")

    return Documents(read)
