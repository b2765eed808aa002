"""Python programs that tests run in processes of their own, which have imported torch already: it takes seconds."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import tempfile
import types
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from tests.commands import Ended


def run_program(forks: BaseContext, *arguments: object, folder: Path | None = None) -> Ended:
    """What `python ARGUMENTS` does with one thread: a path, `-m MODULE` or `-c CODE`, and the program's own arguments.

    Args:
        forks: the fixture, of processes that have imported logitcache from the checkout.
        arguments: of the command.
        folder: the working directory; by default this one.
    """
    with tempfile.TemporaryDirectory() as outputs:
        process = forks.Process(  # type: ignore[attr-defined]
            target=_run, args=(list(map(str, arguments)), folder or Path.cwd(), Path(outputs))
        )
        process.start()
        process.join()
        out, err = ((Path(outputs) / name).read_text() for name in ("out", "err"))
    return Ended(process.exitcode, out, err)


def _run(arguments: list[str], folder: Path, outputs: Path) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("LOGITCACHE")]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    program, *rest = arguments
    try:
        if program in ("-m", "-c"):
            sys.path.insert(0, str(folder))
            given, *rest = rest
            sys.argv = [program, *rest]
            if program == "-m":
                runpy.run_module(given, run_name="__main__", alter_sys=True)
            else:
                main = sys.modules["__main__"] = types.ModuleType("__main__")
                exec(given, vars(main))
        else:
            sys.path.insert(0, str(Path(program).parent))
            sys.argv = arguments
            runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # processes of multiprocessing end without it
