"""SQL over runs, by duckdb in memory: nothing is written, and no file but those of the runs is read."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from noether.config.errors import ConfigError, error_at
from noether.reports.reading.frames import import_optional
from noether.reports.setting_paths import walk_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb

    from noether.reports.reading.run_record import RunRecord

VIEWS: Final = {
    "runs": "run VARCHAR, name VARCHAR, status VARCHAR, started TIMESTAMP, ending VARCHAR, path VARCHAR",
    "metrics": "run, event, epoch, update, sample, time_s, key, value",
    "config": "run VARCHAR, key VARCHAR, value VARCHAR",
    "summary": "run VARCHAR, key VARCHAR, value VARCHAR",
    "checkpoints": "run VARCHAR, tag VARCHAR, epoch BIGINT, update BIGINT, sample BIGINT, bytes BIGINT, "
    "pointers VARCHAR",
    "artifacts": "run VARCHAR, epoch BIGINT, update BIGINT, sample BIGINT, key VARCHAR, kind VARCHAR, path VARCHAR",
}
"""Columns of the tables that a statement can read; those of `metrics` come from arrays."""

_SETTINGS: Final = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",  # else a large sort writes to the working directory
}

_READ_ONLY: Final = frozenset({"SELECT", "EXPLAIN", "PRAGMA", "CALL", "MULTI"})
"""Kinds of statements that return rows and change nothing; `pivot` is MULTI."""

# duckdb reads NaN in an array as NULL; no logged value is NULL.
_METRICS: Final = """
create view metrics as
select runs.run, points.event, points.epoch, points.update, points.sample,
       coalesce(points.time_s, 'nan'::DOUBLE) as time_s, keys.key, coalesce(vals.value, 'nan'::DOUBLE) as value
from _values as vals
join _points as points on points.line = vals.line
join _keys as keys on keys.id = vals.key
join _run_names as runs on runs.id = points.run
"""


class QueryResult(NamedTuple):
    """The rows that a statement returned.

    Args:
        columns: Names of the columns, each once.
        rows: The rows, as Python values; None for NULL.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def query_runs(runs: Mapping[str, RunRecord], statement: str) -> QueryResult:
    """Run a SQL statement over runs, and return its rows.

    The tables are `metrics(run, event, epoch, update, sample, time_s, key, value)` with a row for each logged value,
    a DOUBLE with NaN and infinities as they were logged; `runs`, with times in UTC; `config` and `summary`, with dotted
    keys and values as text; `checkpoints`; and `artifacts`.

    Args:
        runs: The runs by the name that they have in the column `run`.
        statement: The statement, in the dialect of duckdb.

    Raises:
        ConfigError: If duckdb refuses the statement, or it is not exactly one that reads tables; the message lists the
            tables. Statements that read or write files are refused.
        MissingLibraryError: If duckdb is not installed.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     for value in (0.5, 0.25):
        ...         state = noether.TrainState()
        ...         directory.interpreter([noether.LogScalars({"loss": value})], state, noether.AfterUpdate(time_s=0.0))
        E0_U0_S0  ...
        >>> runs = {"mine": noether.read_run(directory.path)}
        >>> query_runs(runs, "select run, key, min(value) as low from metrics group by all")
        QueryResult(columns=('run', 'key', 'low'), rows=[('mine', 'loss', 0.25)])
    """
    duckdb = import_optional("duckdb", "pip install 'noether[query]'")
    with duckdb.connect(":memory:", config=_SETTINGS) as connection:
        _create_tables(connection, runs, statement)
        connection.execute("set lock_configuration = true")
        try:
            _check_statement([each.type.name for each in connection.extract_statements(statement)])
            result = connection.execute(_hide_arrays(statement))
            return QueryResult(_number_repeats([column[0] for column in result.description]), result.fetchall())
        except duckdb.Error as error:
            raise _statement_error(error) from error


def _check_statement(kinds: Sequence[str]) -> None:
    """Raise an error unless there is one statement, given by its kind, and it returns rows and changes nothing."""
    if len(kinds) > 1:
        raise _statement_error(
            f"there are {len(kinds)} statements, separated by `;`; write one, which `with NAME as (...)` may precede"
        )
    if not _READ_ONLY.issuperset(kinds):
        raise _statement_error(f"{kinds[0]} is not possible, because tables are only read; begin with select")
    if not kinds:
        raise _statement_error("it is empty; write one that begins with select")


def _hide_arrays(statement: str) -> str:
    """Return a statement that hides the arrays behind the view `metrics` if it lists tables; else the same statement.

    Example:
        >>> _hide_arrays("select 1")
        'select 1'
    """
    lists_tables = re.fullmatch(r"\s*(show(\s+all)?\s+tables)\s*;?\s*", statement, re.IGNORECASE)
    if lists_tables is None:
        return statement
    return f"from ({lists_tables[1]}) where name in ({', '.join(map(repr, VIEWS))})"


def _statement_error(reason: object) -> ConfigError:
    text = " ".join(str(reason).partition("\n\nLINE")[0].split())
    tables = (f"{name}({', '.join(_column_names(columns))})" for name, columns in VIEWS.items())
    return error_at("the statement", "\n  ".join([text, "the tables are:", *tables]))


def _column_names(columns: str) -> list[str]:
    return [column.split()[0] for column in columns.split(", ")]


def _number_repeats(names: Sequence[str]) -> tuple[str, ...]:
    """Return column names, each once: the second `a` becomes `a_2`.

    Example:
        >>> _number_repeats(["a", "a", "b"])
        ('a', 'a_2', 'b')
    """
    found: dict[str, None] = {}
    for name in names:
        new, count = name, 1
        while new in found:
            count += 1
            new = f"{name}_{count}"
        found[new] = None
    return tuple(found)


def _create_tables(connection: duckdb.DuckDBPyConnection, runs: Mapping[str, RunRecord], statement: str) -> None:
    """Create all tables; `metrics` and `artifacts` stay empty if the statement does not name them: logs may be long."""
    _register_metrics(connection, runs if _may_read("metrics", statement) else {})
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in VIEWS}
    for run, record in runs.items():
        started = None if record.started_s is None else np.datetime64(int(record.started_s * 1e6), "us")
        rows["runs"].append((run, record.name, record.status, started, record.summary.get("ending"), str(record.path)))
        rows["config"] += [(run, *item) for item in _settings_as_text(record.config)]
        rows["summary"] += [(run, *item) for item in _settings_as_text(record.summary)]
        for manifest in record.checkpoints:
            pointers = ", ".join(name for name, tag in record.pointers.items() if tag == manifest.tag)
            size = sum(part.size_bytes for part in manifest.parts.values())
            at = manifest.iteration
            rows["checkpoints"].append((run, manifest.tag, at.epoch, at.update, at.sample, size, pointers))
        artifacts = record.artifacts if _may_read("artifacts", statement) else ()
        rows["artifacts"] += [
            (run, at.epoch, at.update, at.sample, each.key, each.kind, str(each.path))
            for each in artifacts
            for at in [each.point]
        ]
    for name, columns in VIEWS.items():
        if name != "metrics":
            connection.execute(f"create table {name} ({columns})")
            if rows[name]:
                arrays = (np.array(column, object) for column in zip(*rows[name], strict=True))
                connection.register("_rows", dict(zip(_column_names(columns), arrays, strict=True)))
                connection.execute(f"insert into {name} select * from _rows")  # noqa: S608  # our own names
                connection.unregister("_rows")


def _may_read(table: str, statement: str) -> bool:
    """Return whether a statement may read a table: it contains its name, or a call that takes the name as text.

    Example:
        >>> _may_read("metrics", 'from "Metrics"'), _may_read("metrics", "from runs")
        (True, False)
    """
    return any(text in statement.lower() for text in (table, "query(", "query_table", "execute"))


def _register_metrics(connection: duckdb.DuckDBPyConnection, runs: Mapping[str, RunRecord]) -> None:
    """Create the view `metrics` over arrays, which duckdb does not copy."""
    ids: dict[str, int] = {}
    points: dict[str, list[Any]] = {name: [] for name in ("run", "event", "epoch", "update", "sample", "time_s")}
    values: dict[str, list[Any]] = {"line": [], "key": [], "value": []}
    first = 0
    for index, record in enumerate(runs.values()):
        metrics = record.metrics
        points["run"].append(np.full(len(metrics.points), index, np.int32))
        for name, array in vars(metrics.points).items():
            points[name].append(array)
        for key, series in metrics.items():
            values["line"].append((series.lines + first).astype(np.int32))
            values["key"].append(np.full(len(series), ids.setdefault(key, len(ids)), np.int32))
            values["value"].append(series.values.astype(np.float64))
        first += len(metrics.points)
    empty = {"event": "U1", "epoch": np.int64, "update": np.int64, "sample": np.int64, "time_s": np.float64}
    empty |= {"run": np.int32, "line": np.int32, "key": np.int32, "value": np.float64}
    joined = {
        name: np.concatenate([*parts, np.zeros(0, empty[name])]) for name, parts in (*points.items(), *values.items())
    }
    numbers = np.arange(max(first, len(ids), len(runs)), dtype=np.int32)
    connection.register("_points", {"line": numbers[:first], **{name: joined[name] for name in points}})
    connection.register("_values", {name: joined[name] for name in values})
    for table, column, texts in (("_keys", "key", list(ids)), ("_run_names", "run", list(runs))):
        connection.execute(f"create table {table} (id INTEGER, {column} VARCHAR)")
        if texts:
            connection.register("_rows", {"id": numbers[: len(texts)], column: np.array(texts, object)})
            connection.execute(f"insert into {table} select * from _rows")  # noqa: S608  # our own names
            connection.unregister("_rows")
    connection.execute(_METRICS)


def _settings_as_text(settings: Any) -> Iterator[tuple[str, str | None]]:
    """Yield each single value by its dotted path, as text.

    Example:
        >>> list(_settings_as_text({"run": {"name": "a", "tags": [1, True, None]}}))
        [('run.name', 'a'), ('run.tags.0', '1'), ('run.tags.1', 'true'), ('run.tags.2', None)]
    """
    for path, value in walk_settings(settings):
        yield path, value if value is None or isinstance(value, str) else json.dumps(value, default=str)
