"""Every error that a user can cause or meet, with the exit code that the command line gives it.

WorkbenchError (1)
├── InputError (2)        ValueError    an argument, option or file that cannot be meant that way
├── NotFound (4)          LookupError   an id, project or method that the store does not have
├── MissingExtra (5)      ImportError   an optional package is not installed
├── EndpointError (6)     RuntimeError  a model server did not do what was asked
├── TrainingError (7)     RuntimeError  a training run that cannot work, or did not
└── StoreError (10)       RuntimeError
    ├── StoreNewer (11)                 written by a newer version of the workbench
    ├── StoreDamaged (12)               truncated, or not a DuckDB file
    ├── StoreReadOnly (13)              the file or its folder cannot be written
    ├── StoreFull (14)                  the disk is full
    ├── StoreBusy (15)                  another process is writing and did not yield in time
    └── StoreMissing (16)               there is no store yet

Exit code 3 is no error: a command that finished and left something over: records in quarantine, exchanges
that could not be distilled.
"""

from __future__ import annotations

EXIT_QUARANTINED = 3


class WorkbenchError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1


def is_interrupt(error: BaseException) -> bool:
    """Whether this is Ctrl-C: in the middle of a DuckDB statement it reaches us as DuckDB's own error."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RuntimeError) and str(error).startswith("Query interrupted")
    )


class InputError(WorkbenchError, ValueError):
    """An argument or file that cannot be meant that way."""

    exit_code = 2


class NotFound(WorkbenchError, LookupError):
    """An id or name that the store does not have."""

    exit_code = 4


class MissingExtra(WorkbenchError, ImportError):
    """An optional package is not installed; the message names the extra that brings it.

    Args: what: says what needs which package, without a full stop; extra: its name in pyproject.toml.
    """

    exit_code = 5

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what}. In the workbench's folder: pip install -e '.[{extra}]'")


class EndpointError(WorkbenchError, RuntimeError):
    """A model server did not do what was asked."""

    exit_code = 6


class TrainingError(WorkbenchError, RuntimeError):
    """A training run that cannot work, or did not."""

    exit_code = 7


class StoreError(WorkbenchError, RuntimeError):
    """The store file cannot be used."""

    exit_code = 10


class StoreNewer(StoreError):
    """The file was written by a newer version of the workbench."""

    exit_code = 11


class StoreDamaged(StoreError):
    """The file is truncated or is not a DuckDB file."""

    exit_code = 12


class StoreReadOnly(StoreError):
    """The file or its folder cannot be written."""

    exit_code = 13


class StoreFull(StoreError):
    """The disk is full."""

    exit_code = 14


class StoreBusy(StoreError):
    """Another process is writing and did not yield in time."""

    exit_code = 15


class StoreMissing(StoreError):
    """There is no store at this path yet."""

    exit_code = 16
