"""Files from strangers are read in a process of their own, which may hang, crash or be killed.

A damaged HDF5 file can keep the HDF5 library in a loop for ever, under Python's lock, so that no
signal is taken and no thread runs; others make it allocate without end. The process has limits of
memory and time by the file's size. It is started once and ends by itself when nothing is asked.
"""

from __future__ import annotations

import atexit
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from iqmpc.demos.formats import budget
from iqmpc.demos.types import Defect, DemonstrationError, Draft, Facts

_IDLE_S = 10.0
_GRACE_S = 30.0  # beyond the budget's own limit, which the readers keep between their calls
_START_S = 60.0
_FREE_MEMORY = 2**31  # address space of the libraries beside what is made of a file
_LENGTH = struct.Struct("<Q")


def read(
    path: str | os.PathLike[str], format: str | None = None, facts: Facts | None = None
) -> Draft | Defect:
    """As `formats.read`, in a process of its own: also a `Defect` for a file that crashes or hangs
    its reader."""
    path = Path(path)
    with _LOCK:
        return _child().read(path, format, facts)


class _Child:
    """This process's end of the one that reads."""

    def __init__(self) -> None:
        # Neither fork, which HDF5 and threads do not survive, nor multiprocessing's spawn, which
        # would import a script of the caller's again.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from iqmpc.demos.formats import isolated; "
            "isolated.serve()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # of a Popen with pipes
        self._questions, self._answers = stdin, stdout
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def read(self, path: Path, format: str | None, facts: Facts | None) -> Draft | Defect:
        limit_s = budget.Budget(budget.size_of(path)).limit_s + _GRACE_S
        try:
            _send(self._questions, (os.getcwd(), path, format, facts))
            answer = _receive(self._answers, time.monotonic() + _START_S + limit_s)
        except (EOFError, BrokenPipeError):
            self.end()
            code = self._process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Defect(str(path), "", f"damage that ended its reader ({how})", "a sound file")
        except TimeoutError:
            self.end()
            return Defect(str(path), "", f"no end of reading after {limit_s:.0f} s", "a sound file")
        except BaseException:
            self.end()  # what it answers belongs to nobody any more
            raise
        if isinstance(answer, _Refusal):
            raise DemonstrationError(answer.message)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._questions.close()
        self._answers.close()


class _Refusal:
    """A `DemonstrationError` that the reader raised."""

    def __init__(self, message: str):
        self.message = message


_LOCK = threading.Lock()
_held: tuple[int, _Child] | None = None  # of which process, as a fork has no child


def _child() -> _Child:
    global _held
    if _held is None or _held[0] != os.getpid() or not _held[1].alive:
        if _held is None:
            atexit.register(_end)
        _held = os.getpid(), _Child()
    return _held[1]


def _end() -> None:
    if _held is not None and _held[0] == os.getpid():
        _held[1].end()


def serve() -> None:
    """The reading process: answers until nothing is asked for a while, or the asker ends."""
    from iqmpc.demos import formats

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asker's, which ends this one
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    while select.select([asked], [], [], _IDLE_S)[0]:
        try:
            folder, path, format, facts = _receive(asked, None)
        except EOFError:
            return
        try:
            os.chdir(folder)
            _limit(path)
            answer: Any = formats.read(path, format, facts)
        except DemonstrationError as error:
            answer = _Refusal(str(error))
        except MemoryError:
            answer = Defect(str(path), "", "more data than its bytes can hold", "a sound file")
        except Exception as error:  # what a damaged file can raise in its library has no end
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            answer = Defect(
                str(path), "", f"damage that its reader did not expect ({said})", "a sound file"
            )
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return


def _limit(path: Path) -> None:
    """Address space for the file at hand, beside what is in use by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = (
        pages * resource.getpagesize()
        + _FREE_MEMORY
        + 2 * budget.Budget(budget.size_of(path)).limit
    )
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS,
        (allowed if hard == resource.RLIM_INFINITY else min(allowed, hard), hard),
    )


def _send(pipe: IO[bytes], value: object) -> None:
    """Arrays go as they lie in memory, beside the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    for part in (
        _LENGTH.pack(len(raws)),
        *(_LENGTH.pack(raw.nbytes) for raw in raws),
        _LENGTH.pack(len(data)),
        data,
        *raws,
    ):
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes], deadline: float | None) -> Any:
    """What `_send` sent; `EOFError` where the other end closed, `TimeoutError` past `deadline`."""

    def exactly(count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            if (
                deadline is not None
                and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]
            ):
                raise TimeoutError
            got = os.readv(pipe.fileno(), [view])
            if not got:
                raise EOFError
            view = view[got:]
        return data

    def length() -> int:
        return _LENGTH.unpack(exactly(_LENGTH.size))[0]

    sizes = [length() for _ in range(length())]
    data = exactly(length())
    return pickle.loads(data, buffers=[exactly(size) for size in sizes])
