"""Python commands in processes of their own, without the seconds that imports take.

One process imports the libraries and forks for each command. Nothing of cg_lightning is imported
before the fork. Where there is a GPU, each command is a new process: CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("lightning.pytorch", "torchmetrics", "hydra", "rich.table", "sklearn.datasets")
_OF_RANKS = (
    *("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "GLOBAL_RANK", "RANK"),
    *("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
Done = subprocess.CompletedProcess[str]
_servers: dict[str, subprocess.Popen[str]] = {}


def run_python(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    python: str = sys.executable,
) -> Done:
    """Run ``python`` with arguments: ``-m module ...``, ``-c code`` or ``file.py ...``."""
    from cg_lightning.backends import cuda

    if cuda.is_available() or not hasattr(os, "fork"):
        command, settings = [python, *arguments], {"cwd": folder, "env": environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    with tempfile.TemporaryDirectory() as texts:
        names = {name: str(Path(texts) / name) for name in ("stdout", "stderr")}
        request = {"arguments": arguments, "folder": str(folder), "environment": dict(environment)}
        code = _ask(python, {**request, **names})
        printed = {name: Path(file).read_text() for name, file in names.items()}
    return Done(list(arguments), code, **printed)


def run_two_ranks(module: str, *arguments: str) -> Done:
    """Run ``python -m module``, whose Trainer starts a second process for its second rank."""
    # Trainers of other tests leave these variables
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    environment["PYTHONWARNINGS"] = "ignore"
    root = Path(__file__).parent.parent
    return run_python("-m", module, *arguments, folder=root, environment=environment)


def _ask(python: str, request: dict[str, Any]) -> int:
    server = _servers.get(python)
    if server is None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command, root = [python, "-m", __name__], Path(__file__).parent.parent
        # a session of its own: what it starts can be ended with it
        server = subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)
        _servers[python] = server
        atexit.register(_stop, python)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        print(json.dumps(request), file=server.stdin, flush=True)
        return int(server.stdout.readline())
    except BaseException:  # its answer would be taken for that of the next command
        _stop(python)
        raise


def _stop(python: str) -> None:
    server = _servers.pop(python, None)
    if server is not None:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def serve() -> None:
    """Answer each request with the exit status of a child that runs it."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(library)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(status_of(json.loads(line)))  # to tear all libraries down takes seconds
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def status_of(request: dict[str, Any]) -> int:
    """Run a command to its end, and return its exit status as the interpreter would."""
    try:
        become(request)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def paths_of(environment: Mapping[str, str]) -> list[str]:
    return list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


def become(request: dict[str, Any]) -> None:
    """Be the command: its folder, files, environment and arguments, and then its code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    os.chdir(request["folder"])
    before, given = (paths_of(each) for each in (os.environ, request["environment"]))
    sys.path[1:] = [*given, *[path for path in sys.path[1:] if path not in before]]
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONWARNINGS") == "ignore":  # the interpreter reads it when it starts
        warnings.simplefilter("ignore")
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = request["folder"], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = request["folder"], [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve()
