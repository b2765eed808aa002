"""DataLoader workers that end with the process that started them, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.process import BaseProcess

from torch.utils.data import get_worker_info

POLL_SECONDS = 1.0
"""How often the parent's process id is compared, where its pipe is held open by another process."""

_watched_by: int | None = None
"""The process in which the watch runs; a fork of a worker inherits the number and no thread."""


def end_with_parent(worker_id: int = 0) -> None:
    """End this process when its parent ends, if this process is a DataLoader worker; a `worker_init_fn`.

    torch's own watch of the parent lies between two batches: a worker whose batch does not fit into the pipe any more
    never comes there, since the workers themselves hold the pipe's reading end. Ctrl-C, which a terminal sends to all
    processes, is left to the parent, which ends its workers.
    """
    global _watched_by
    if get_worker_info() is None or _watched_by == os.getpid():
        return
    parent = multiprocessing.parent_process()
    if parent is None:  # a worker that is a thread
        return
    _watched_by = os.getpid()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_the_end_of, args=(parent, os.getppid()), daemon=True).start()


def _wait_for_the_end_of(parent: BaseProcess, parent_id: int) -> None:
    # Not the kernel's parent-death signal: it comes when the *thread* ends that started the worker.
    while parent.is_alive() and os.getppid() == parent_id:
        parent.join(POLL_SECONDS)
    os._exit(1)
