"""Files of tables, through pandas, and their columns as arrays: numbers, dates, texts."""

from __future__ import annotations

import glob
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from distcl.config.paths import reachable
from distcl.data.sources.grouping import NO_SECONDS, YEARS
from distcl.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

_CSV, _PARQUET = (".csv", ".tsv"), (".parquet", ".pq")
_PACKED = (".gz", ".bz2", ".xz", ".zst")

Values = npt.NDArray[Any]


def matching_files(base: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the file, or those in a folder that a pattern names, or all tables, by name."""
    if base.is_file() and not patterns:
        return [base]
    if not base.exists():
        raise DataError(f"stream.path: there is no '{base}'")
    folder = base if base.is_dir() else base.parent
    if not patterns:
        found = [p for p in sorted(folder.iterdir()) if _suffix(p) and p.is_file()]
        if not found:
            raise DataError(f"'{folder}' has no {', '.join((*_CSV, *_PARQUET))} in it")
        return [p for p in found if not p.name.startswith(".")]
    every: list[Path] = []
    for pattern in patterns:
        some = sorted(glob.glob(str(reachable(pattern)), root_dir=folder, recursive=True))
        some = [pattern] if (folder / reachable(pattern)).is_file() else some
        if not some:
            raise DataError(f"'{pattern}' matches no file in '{folder}' (stream.options)")
        every += [folder / name for name in some if folder / name not in every]
    return every


def _suffix(file: Path) -> str:
    name = file.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed) if not name.endswith(_PARQUET) else name
    return next((ending for ending in (*_CSV, *_PARQUET) if name.endswith(ending)), "")


def read_frame(file: Path, missing: Sequence[str], separator: str) -> pd.DataFrame:
    """Return the rows of a file; ConfigError without pandas, DataError on what is no table."""
    suffix = _suffix(file)
    if not suffix:
        raise DataError(f"'{file}' is no table: {', '.join((*_CSV, *_PARQUET))} are read")
    try:
        import pandas as pd

        if suffix in _PARQUET:
            import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"stream.source = 'table' needs the package '{error.name}'; type: pip install "
            "'distcl[table]'"
        ) from None
    try:
        if suffix in _PARQUET:
            return _parquet(file, missing)
        given: dict[str, Any] = {"sep": "\t" if suffix == ".tsv" else separator}
        header = pd.read_csv(file.absolute(), header=None, nrows=1, dtype=str, **given)
        names = header.iloc[0].tolist()
        _check_names(names, file)
        frame = pd.read_csv(
            file.absolute(), keep_default_na=False, na_values=["", *missing], low_memory=False,
            skip_blank_lines=len(names) > 1, **given,
        )  # fmt: skip
    except DataError:
        raise
    except Exception as error:  # whatever the libraries raise on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"'{file}' cannot be read: {reason}") from error
    if len(frame) and not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"'{file}' has rows of more fields than its header")
    return frame


def _check_names(names: Sequence[str], file: Path) -> None:
    if twice := [n for k, n in enumerate(names) if n in names[:k]]:
        raise DataError(f"'{file}' has two columns '{twice[0]}'")


def _parquet(file: Path, missing: Sequence[str]) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    found = ParquetFile(str(file)).read()
    _check_names(found.column_names, file)
    for k, column in enumerate(found.schema):
        if pa.types.is_decimal(column.type):
            found = found.set_column(k, column.name, found.column(k).cast(pa.float64()))
        elif pa.types.is_dictionary(column.type):
            found = found.set_column(k, column.name, found.column(k).cast(column.type.value_type))
    frame = found.to_pandas(ignore_metadata=True)
    frame = frame[[name for name in frame if not name.startswith("__index_level_")]]
    numbers = pd.to_numeric(pd.Series([*missing], dtype=object), errors="coerce").dropna()
    return frame.replace([*missing, *numbers], None) if missing else frame


def refuse(file: Path, row: int, name: str, what: str) -> NoReturn:
    """Raise DataError naming file, row and column."""
    raise DataError(f"'{file}', row {row + 1}: column '{name}' {what}")


def as_text(value: Any) -> str:
    """Return a value as the name of a category or class: 1.0 is 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def numeric(column: pd.Series, name: str, file: Path) -> Values:
    """Return numbers, float64 [N], NaN where one is missing."""
    import pandas as pd

    kind = pd.api.types
    if kind.is_datetime64_any_dtype(column) or kind.is_timedelta64_dtype(column):
        raise DataError(f"'{file}': column '{name}' holds dates, no numbers (stream.options.time)")
    found: Values = pd.to_numeric(column, errors="coerce").to_numpy(
        dtype=np.float64, na_value=np.nan
    )
    wrong = np.isnan(found) & column.notna().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        what = f"is '{column.iloc[row]}', no number; name it in stream.options.categories, or leave"
        refuse(file, row, name, f"{what} it out (stream.options.features)")
    if np.isinf(found).any():
        refuse(file, int(np.isinf(found).argmax()), name, "is infinite")
    return found


def whole(frame: pd.DataFrame, name: str, file: Path) -> Values:
    """Return a column as it is; DataError names a row where it is missing."""
    lacking = frame[name].isna().to_numpy()
    if lacking.any():
        refuse(file, int(lacking.argmax()), name, "is missing")
    values: Values = frame[name].to_numpy()
    return values


def check_classes(values: Values, mixed: bool, name: str, file: Path) -> None:
    """Refuse values that are no class, and, if ``mixed``, numbers of which some are none."""
    import pandas as pd

    if values.dtype.kind != "O":
        return
    lists = np.array([not isinstance(value, Hashable) for value in values])
    if lists.any():
        refuse(file, int(lists.argmax()), name, "is a list")
    texts = pd.to_numeric(pd.Series(values), errors="coerce").isna().to_numpy()
    if mixed and texts.any() and not texts.all():
        row = int(texts.argmax())
        what = f"is '{values[row]}', no number, but others are; name it in stream.options.missing"
        refuse(file, row, name, f"{what}, or say stream.options.task = 'classification'")


def as_dates(values: Values, name: str, file: Path) -> Values:
    """Return dates, or numbers of seconds, as dates."""
    if values.dtype.kind == "M":
        return values
    far = ~((values >= YEARS[0]) & (values < YEARS[1]))
    if far.any():
        row = int(far.argmax())
        refuse(file, row, name, f"is {values[row]:.0f} seconds, no date: {NO_SECONDS}")
    return (values * 1e6).astype("datetime64[us]")


def dates(frame: pd.DataFrame, name: str, form: str, file: Path) -> Values:
    """Return dates, datetime64 [N] in UTC, or numbers."""
    import pandas as pd

    column = frame[name]
    whole(frame, name, file)
    if pd.api.types.is_numeric_dtype(column) and not form:
        return numeric(column, name, file)
    if form:
        column = column.astype(str)
    found = pd.to_datetime(column, format=form or "ISO8601", utc=True, errors="coerce")
    if found.isna().any():
        row = int(found.isna().to_numpy().argmax())
        wanted = f"'{form}'" if form else "ISO (stream.options.time_format)"
        refuse(file, row, name, f"is '{column.iloc[row]}', no date of the form {wanted}")
    return np.asarray(found.dt.tz_localize(None).to_numpy())
