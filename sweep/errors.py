"""What can go wrong for a user: one line, a hint, and an exit code of its own.

    SweepError                      exit
    ├── UsageError                     2   a flag or an answer is missing
    ├── SpecError                      2   the spec file (or --set) is wrong; names key and line
    ├── BudgetError                    3   the cap ended before there was a winner
    ├── NotFoundError                  4   no such study, trial or storage
    ├── InvariantError                 5   the ledger's audit found something, or an overrun froze the study
    ├── StoreError                     6   the database is busy, unreachable, or of another version
    │   ├── StoreUnavailableError      6   ... for the moment: tried again by itself
    │   │   └── OutcomeUnknownError    6   lost during COMMIT; a repetition is safe
    │   ├── StoreFullError             8   the database's disk is full
    │   └── StudyBusyError             6   another orchestrator drives this study, or took it over
    ├── UnusableError                  7   model or data cannot be used
    ├── DiskError                      8   a checkpoint could not be written
    ├── WorkerError                    1   the worker died again and again
    └── Interrupted                  130   Ctrl-C or SIGTERM; everything is checkpointed and settled

Exit code 0 is success: the cap may be spent, but there is a winner. 1 is any other failure.
"""

from __future__ import annotations


class SweepError(Exception):
    """Base of all errors that a user sees as one line: what and where, then what to do."""

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(SweepError):
    """A flag or an answer is missing."""

    exit_code, code = 2, "usage"


class SpecError(SweepError):
    """The spec is wrong; the message names the key and the line."""

    exit_code, code = 2, "spec"


class BudgetError(SweepError):
    """The cap ended before there was a winner, or cannot pay for a first slice."""

    exit_code, code = 3, "budget"


class NotFoundError(SweepError):
    """No such study, trial or storage."""

    exit_code, code = 4, "not_found"


class InvariantError(SweepError):
    """The audit found an invariant that does not hold, or the study is frozen after an overrun."""

    exit_code, code = 5, "invariant"


class StoreError(SweepError):
    """The database is busy, cannot be reached, or has another version."""

    exit_code, code = 6, "store"


class StoreUnavailableError(StoreError):
    """The database is busy or cannot be reached at the moment."""

    code = "store_unavailable"


class OutcomeUnknownError(StoreUnavailableError):
    """The connection was lost during COMMIT; whether it took place is seen when the database is back."""

    code = "outcome_unknown"


class StoreFullError(StoreError):
    """The disk that the database is on is full; the change that met it was rolled back."""

    exit_code, code = 8, "disk"


class StudyBusyError(StoreError):
    """Another orchestrator drives this study."""

    code = "study_busy"


class UnusableError(SweepError):
    """Model or data cannot be used."""

    exit_code, code = 7, "unusable"


class DiskError(SweepError):
    """The disk is full or cannot be written."""

    exit_code, code = 8, "disk"


class WorkerError(SweepError):
    """The worker died again and again."""

    code = "worker"


class Interrupted(SweepError):
    """Ctrl-C or SIGTERM: what ran is checkpointed and settled."""

    exit_code, code = 130, "interrupted"
