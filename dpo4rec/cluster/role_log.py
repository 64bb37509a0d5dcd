"""One plain log file for each role and rank of a run: `logs/<role>-<rank>.log`."""

import datetime
import fcntl
import itertools
import os
import socket
from collections import deque
from pathlib import Path
from typing import TextIO

TAIL_LINES = 12


class RoleLog:
    """What one worker says, with times, in a file of its own.

    The rank is the first that no living worker of this role has: a worker that replaces a dead one goes on in its file.

    Args:
        folder: of the logs; None: nothing is written, the last lines are still kept.
        role: what the worker does.
    """

    def __init__(self, folder: Path | None, role: str) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.file = _claimed(folder, role) if folder is not None else None
        self(f"pid {os.getpid()} on {socket.gethostname()}")

    def __call__(self, text: str) -> None:
        lines = f"{datetime.datetime.now().isoformat(timespec='milliseconds')} {text}".rstrip().splitlines()
        self.tail.extend(lines)
        if self.file is not None:
            self.file.write("\n".join(lines) + "\n")
            self.file.flush()

    @property
    def name(self) -> str:
        return self.file.name if self.file is not None else "not kept in a file"

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _claimed(folder: Path, role: str) -> TextIO:
    """Opens the first log file of the role that is free; it is locked until its worker ends, in whatever way."""
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{socket.gethostname()}-{os.getpid()}"
    for rank in itertools.count():
        file = (folder / f"{role}-{rank}.log").open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            file.close()
        except OSError:  # a file system without locks: there is no telling whose the files are
            file.close()
            return (folder / f"{role}-{own}.log").open("a", encoding="utf-8")
    raise AssertionError  # count() does not end


def unfinished(folder: Path, role: str) -> list[str]:
    """The last unit that each worker of the role began and did not end, as it was logged; none is left by a run that ended well."""
    found = []
    for file in sorted(folder.glob(f"{role}-*.log")):
        lines = [line.split(" ", 1)[1] for line in file.read_text(encoding="utf-8").splitlines() if line.split()[1:2] == ["unit"]]
        if lines and " begun" in lines[-1]:
            found.append(f"{file.name}: {lines[-1]}")
    return found
