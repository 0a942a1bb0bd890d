"""What must not happen while a file is read: seen from inside the process, by Python's audit hooks,
inotify and the kernel's own accounts."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Starting anything, talking to anybody, unpickling by name.
_NEVER = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen",
          "os.spawn", "socket.connect", "socket.bind", "ctypes.dlopen", "pickle.find_class",
          "os.remove", "os.rename", "os.symlink", "os.link", "os.chmod", "os.truncate",
          "shutil.rmtree")  # fmt: skip
_IN_OPEN = 0x20 | 0x1 | 0x100  # opened, read, created
_MIB = 2**20


@dataclass
class Guard:
    """Watches what is done while it is on; `folder` is where a reader may read and write."""

    folder: Path
    seen: list[str] = field(default_factory=list)
    on: bool = False

    def __post_init__(self) -> None:
        libraries = [*sys.path, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])]
        self._read = tuple({os.path.realpath(p) for p in libraries if p})
        self._write = (os.path.realpath(self.folder), os.path.realpath(tempfile.gettempdir()))
        sys.addaudithook(self._hook)
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK)
        outside = self.folder / "outside"
        libc.inotify_add_watch(self._inotify, bytes(outside), _IN_OPEN)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._opened(*arguments[:3])
        elif event in _NEVER and not (event.startswith("os.") and self._inside(arguments)):
            self.seen.append(f"{event}{arguments!r:.200}")

    def _inside(self, arguments: tuple[Any, ...]) -> bool:
        """Changes of files in the folder itself are the reader's business (a resumed run's log)."""
        paths = [a for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        return bool(paths) and all(
            os.path.realpath(os.fsdecode(p)).startswith(self._write) for p in paths
        )

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a file that is open already
        place = os.path.realpath(os.fsdecode(path))
        writes = (isinstance(mode, str) and mode[:1] in "wax") or bool(flags and flags & 3)
        allowed = place.startswith(self._write) or (
            not writes
            and place.startswith((*self._read, "/proc/", "/sys/", "/dev/", "/usr/", "/etc/"))
        )
        if not allowed or "/outside/" in place:
            self.seen.append(f"open {place} {mode}")

    def start(self) -> None:
        self.seen.clear()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is now what is in use
        self._before, self._cpu = _status("VmRSS"), time.process_time()
        self.on = True

    def stop(self) -> tuple[list[str], int, float]:
        """(what was seen, bytes at the peak beyond those before, CPU seconds)."""
        self.on = False
        seconds = time.process_time() - self._cpu
        try:
            if os.read(self._inotify, 4096):
                self.seen.append("opened outside/canary.h5")
        except BlockingIOError:
            pass
        return list(self.seen), max(0, _status("VmHWM") - self._before), seconds


def limit_process(memory: int, seconds: int) -> None:
    """Ends this process, even in the middle of a C function, by memory and CPU time."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + memory, most))
    extend_time(seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def extend_time(seconds: int) -> None:
    """So many CPU seconds more, from now on."""
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
