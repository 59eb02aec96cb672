"""Threads that pass bytes on."""

import errno
import threading
from collections.abc import Callable


def started(work: Callable[[], None]) -> threading.Thread:
    """Start a thread that does not keep the process alive.

    Raises
    ------
    OSError
        The system allows no more threads.
    """
    thread = threading.Thread(target=work, name="vmsnap-import", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        limits = "raise ulimit -u, or pids.max of the control group"
        raise OSError(errno.EAGAIN, f"{error}: the system allows no more threads; {limits}") from None
    return thread
