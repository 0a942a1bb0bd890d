"""Errors that are about what the user gave. The command line prints them as one message."""


def printable(text: str) -> str:
    """Text for a terminal, which what a file says must not steer: control characters escaped."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def one_line(error: Exception) -> str:
    """What an error says in a line of 200 characters: one about a file may repeat its content."""
    return " ".join(str(error).split())[:200]


class IqmpcError(Exception):
    """Base of every error whose cause is the input: a setting, a file, a missing extra."""


class ConfigError(IqmpcError, ValueError):
    """A setting that is unknown, ill-typed or out of range; the message names the key."""


class BackendError(IqmpcError, RuntimeError):
    """A kernel backend was named that cannot run here; the message says what is missing."""


class TaskError(IqmpcError, RuntimeError):
    """A task that is unknown, misses its extra, or does not fit the method."""


class CheckpointError(IqmpcError, RuntimeError):
    """A run folder or checkpoint that cannot be read."""


class WorkerError(IqmpcError, RuntimeError):
    """An environment's worker process failed more often than it may be restarted."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; `signal` is its number."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal
