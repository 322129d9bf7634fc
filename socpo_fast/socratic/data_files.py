"""Reads the rows of data sets: JSON lines by json, parquet by pyarrow, one row after another.

Read read_rows, then json_rows and parquet_rows. The `datasets` library only finds the files of a
folder or a hub data set, and the same two readers read them. So JSON lines need neither library,
and a file gives the same rows whoever found it.
"""

import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from socpo_fast.config.text import did_you_mean
from socpo_fast.extras import import_extra

# Longer lines are not parsed: that could take minutes.
MAX_LINE_BYTES = 100_000_000
# Rows of a parquet file that are Python objects at the same time; one may have megabytes.
_ROWS_AT_ONCE = 100
_KINDS = {".jsonl": "JSON lines", ".json": "JSON", ".parquet": "parquet"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# A byte order mark, and the white space of JSON.
_BLANK = b"\xef\xbb\xbf \t\r\n"
_DECODER = json.JSONDecoder(parse_float=Decimal)
# What is wrong with a row is passed on like a row, so that all bad rows are told.
Row = dict[str, Any] | ValueError


def read_rows(
    path: str, *, split: str, subset: str | None, columns: Container[str]
) -> Iterator[tuple[str, Row]]:
    """Yields (file and row number, row) of a file, a folder or a hub data set, in order.

    Rows are numbered from 1 in each file.

    Args:
        columns: names of the columns whose values are needed, see parquet_rows.

    Raises:
        ValueError: there is no such data set, it is of another kind, or it cannot be read.
    """
    local_path = Path(path).expanduser()
    kind = _KINDS.get(local_path.suffix.lower())
    if local_path.is_dir():
        yield from _split_rows(path, split, subset, columns, folder=local_path.resolve())
    elif kind is not None:
        if not local_path.is_file():
            names = [other.name for other in local_path.parent.glob("*.*")]
            near = did_you_mean(local_path.name, names)
            raise ValueError(f"data: path must be an existing file, got '{path}'{near}")
        if kind == "parquet":
            import_extra(f"data: {path}", "pyarrow", extra="parquet")
        with _readable(path, kind), local_path.open("rb") as stream:
            for number, row in (
                parquet_rows(stream, columns)
                if kind == "parquet"
                else json_rows(stream, local_path.name)
            ):
                yield f"{local_path.name} row {number}", row
    elif _HUB_NAME.fullmatch(path) and not local_path.exists():
        yield from _split_rows(path, split, subset, columns, folder=None)
    else:
        raise ValueError(
            f"data: path must be a {', '.join(_KINDS)} file, a folder of them, or owner/name of "
            f"the hub, got '{path}'; {'convert it' if local_path.exists() else 'there is no such'}"
        )


def json_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, Row]]:
    """Yields the numbered rows of JSON lines, or of a file *.json that holds one list of them.

    Empty lines are skipped but counted, so that row numbers are line numbers.

    Memory: one line; all rows of a list.
    """
    # The longest line that is parsed ends in two more bytes.
    read_line = partial(stream.readline, MAX_LINE_BYTES + 2)
    opening = [read_line()]
    if ".json" in Path(name).suffixes:
        while opening[-1] and not opening[-1].strip(_BLANK):
            opening.append(read_line())
        if opening[-1].lstrip(_BLANK).startswith(b"["):
            rows = _DECODER.decode(_text(b"".join(opening) + stream.read()))
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, dict):
                    row = ValueError(f"must be an object, got {row!r:.40}")
                yield number, row
            return
    for number, line in enumerate(chain(opening, iter(read_line, b"")), start=1):
        num_bytes = len(line.rstrip(b"\r\n"))
        if num_bytes > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = read_line()
                num_bytes += len(line.rstrip(b"\r\n"))
            yield number, ValueError(f"must have at most {MAX_LINE_BYTES} bytes, got {num_bytes}")
            continue
        try:
            text = _text(line)
            if text.strip():
                yield number, _parse_line(text.strip())
        except ValueError as error:
            yield number, error


def _parse_line(line: str) -> Row:
    """Returns the fields of a line, or why it has none."""
    try:
        row = _DECODER.decode(line)
    # ValueError: broken JSON, or a number of thousands of digits. RecursionError: thousands of
    # brackets. ArithmeticError: an exponent of many digits.
    except (ValueError, RecursionError, ArithmeticError) as error:
        return ValueError(f"must be a JSON object, got {line[:40]!r} ({error})")
    return row if isinstance(row, dict) else ValueError(f"must be a JSON object, got {line[:40]!r}")


def _text(data: bytes) -> str:
    """Returns text without a byte order mark; ValueError if it is not UTF-8."""
    # Files of a Windows editor begin with a mark; joined ones have more, at line beginnings.
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"must be UTF-8, got byte 0x{byte:02x} after {error.start} others; save it as UTF-8"
        ) from None


def parquet_rows(
    stream: Any, columns: Container[str], features: Any = None
) -> Iterator[tuple[int, Row]]:
    """Yields the numbered rows of a parquet file, with values as their author saw them.

    Python widens float32 0.1 to 0.10000000149011612, and labels are stored as numbers.

    Args:
        stream:   a binary file that can seek.
        columns:  names of the columns to read. Others have no values in the rows: they may be
                  large, or of a type that Python lacks.
        features: {column: type} as `datasets` writes them in JSON; they have the names of labels.
                  None = those that `datasets` wrote into the file, if it did.
    """
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    schema = file.schema_arrow
    if features is None:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = _inside(_inside(written, "info"), "features")
    convert = {
        field.name: _converter(field.type, _inside(features, field.name))
        for field in schema
        if field.name in columns
    }
    # Names only, also of fields of structs, since an error lists the columns of a row.
    unread = {
        inner.name: None
        for field in schema
        if field.name not in columns
        for inner in field.flatten()
    }
    batches = file.iter_batches(_ROWS_AT_ONCE, columns=list(convert))
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield number, unread | {key: to_seen(row[key]) for key, to_seen in convert.items()}


def _inside(feature: Any, key: str) -> Any:
    """Returns an entry of JSON that anybody may have written; None if there is none."""
    return feature.get(key) if isinstance(feature, dict) else None


def _converter(kind: Any, feature: Any) -> Callable[[Any], Any]:
    """Returns a function from a value of this Arrow type to what its author saw."""
    from pyarrow import types

    if types.is_struct(kind):
        inner = {field.name: _converter(field.type, _inside(feature, field.name)) for field in kind}
        return lambda value: value and {key: inner[key](x) for key, x in value.items()}
    if types.is_list(kind) or types.is_large_list(kind):
        convert = _converter(kind.value_type, None)
        return lambda value: value and [convert(x) for x in value]
    if types.is_floating(kind):
        return partial(_decimal, kind.to_pandas_dtype())
    names = _inside(feature, "names")
    if types.is_integer(kind) and isinstance(names, list):
        # The labels of hidden test sets are -1, which is no name.
        return dict(enumerate(names)).get
    return lambda value: value


def _decimal(dtype: type[np.floating[Any]], value: float | None) -> Any:
    """Returns the shortest decimal number of this type; None and infinities as they are."""
    if value is None or not np.isfinite(value):
        return value
    return Decimal(np.format_float_positional(dtype(value), trim="0"))


def _split_rows(
    path: str, split: str, subset: str | None, columns: Container[str], *, folder: Path | None
) -> Iterator[tuple[str, Row]]:
    """Yields (file and row number, row) of a split of a folder or of a hub data set."""
    tried = "" if folder else "no file or folder has this name, so it must be on the hub"
    where = f"data: {path} ({tried})" if tried else f"data: {path}"
    datasets = import_extra(where, "datasets", extra="datasets")
    # The library also logs the errors that it raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    # While it streams, the library writes nothing but lock files to its cache folder.
    with tempfile.TemporaryDirectory(prefix="socpo_data_") as cache:
        links = f"{cache}/data"
        with _readable(
            path,
            f"a data set with a split {split!r}",
            links=links,
            note=f"{tried}: " if tried else "",
            other_error=datasets.exceptions.DatasetsError,
        ):
            # The library takes a path for a pattern, so it gets links in a folder of a plain name.
            if folder is not None:
                shutil.copytree(folder, links, copy_function=os.symlink)
            builder = datasets.load_dataset_builder(
                path if folder is None else links, subset, cache_dir=f"{cache}/cache"
            )
            for file in _files_of(builder, split):
                for number, row in _file_rows(file, builder, columns):
                    yield f"{file.removeprefix(f'{links}/')} row {number}", row


@contextmanager
def _readable(
    path: str,
    expected: str,
    *,
    links: str = "",
    note: str = "",
    other_error: type[Exception] = OSError,
) -> Iterator[None]:
    """Turns an error of the block into a ValueError: `path` must be readable as `expected`.

    Args:
        links:       the folder that the block reads instead of `path`; the error names `path`.
        note:        stands in front of the reason.
        other_error: turned as well.
    """
    try:
        yield
    # RuntimeError: a data set that comes with code, which is never run; a type that pyarrow lacks;
    # thousands of brackets. ArithmeticError: an exponent of many digits.
    except (OSError, ValueError, RuntimeError, ArithmeticError, other_error) as error:
        reason = str(error).replace(links or path, path)
        raise ValueError(
            f"data: {path} must be readable as {expected} ({note}{reason:.500})"
        ) from error


def _files_of(builder: Any, split: str) -> Iterator[str]:
    """Yields the files of a split, or of several that are joined by a plus sign."""
    files_of_split = builder.config.data_files
    for name in split.split("+"):
        if name not in files_of_split:
            raise ValueError(
                f"Bad split: {name}. Available splits: {[str(key) for key in files_of_split]}"
            )
        yield from files_of_split[name]


def _file_rows(file: str, builder: Any, columns: Container[str]) -> Iterator[tuple[int, Row]]:
    """Yields the numbered rows of a file that a builder of `datasets` found."""
    from datasets.download import StreamingDownloadManager
    from datasets.download.streaming_download_manager import xopen
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Json | Parquet):
        # Readers of other kinds guess types: a CSV's "007" would become 7.
        raise ValueError(f"must hold parquet or JSON lines, got {file}; convert it")
    manager = StreamingDownloadManager()
    for part in manager.iter_files(manager.download_and_extract(file)):
        with xopen(part, "rb") as stream:
            if isinstance(builder, Json):
                # Not all of the library's files can read a line of limited length.
                yield from json_rows(io.BufferedReader(stream), file)
            else:
                features = builder.info.features
                yield from parquet_rows(stream, columns, features and features.to_dict())
