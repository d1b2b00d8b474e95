"""What a media worker process runs: take a call from the mailbox, make it, put the result back; until the pipe ends.

Started by `workers.py` as a fresh interpreter that imports this package and nothing of the parent's main module.
"""

import ctypes
import os
import pickle
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

from adapters.errors import AdapterBankError
from service.errors import MediaTooLarge
from service.media.mailbox import Mailbox, Sizes

Outcome = Literal["result", "error"]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_PR_SET_PDEATHSIG = 1


def main(pipe_fd: int, mailbox_fd: int, parent_pid: int, memory_bytes: int) -> None:
    """Serve calls until the parent closes the pipe or dies."""
    pipe: Connection[Any, Any] = Connection(pipe_fd)
    mailbox = Mailbox(mailbox_fd)
    warnings.simplefilter("ignore")  # about other people's files: nobody could act on them
    _ignore_terminal()
    _die_with(parent_pid)
    _limit_memory(memory_bytes)
    try:
        pipe.send("ready")
        while True:
            pipe.send(_answer(mailbox, pipe.recv()))
    except (EOFError, OSError):
        return


def _answer(mailbox: Mailbox, sizes: Sizes) -> tuple[Outcome, Sizes]:
    try:
        function, args, kwargs = mailbox.take(sizes)
        return "result", mailbox.put(function(*args, **kwargs))
    except MemoryError:
        return "error", mailbox.put(MediaTooLarge("decoding needs more memory than allowed"))
    except Exception as error:
        return "error", mailbox.put(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error as the parent can unpickle it; one that is not ours on purpose carries its traceback along as a note."""
    if not isinstance(error, AdapterBankError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _ignore_terminal() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group; the parent decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _die_with(parent_pid: int) -> None:
    """Be killed when the parent's thread that started us ends, even in the middle of a call (Linux; elsewhere the pipe's end has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(0)


def _limit_memory(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    except (ValueError, OSError):  # macOS refuses
        return
