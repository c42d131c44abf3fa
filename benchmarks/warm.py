"""Start the stages of a run from a process that has loaded torch and its friends already.

    python benchmarks/warm.py SOCKET          the process that starts them; ends when its parent does, and they with it
    source-d by bash (BASH_ENV): what `shell_functions` returns

A hundred short jobs otherwise spend more time on imports than on their work. A stage is forked, gets the command's folder,
environment, and standard streams, and runs as `python -m` would run it. Nothing touches a GPU before the fork. Where there
is nobody to ask, or a GPU was touched after all, the command runs as it always did.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MODULES = (  # what stages import, beside their own code
    "torch", "torch.distributed", "torch.utils.data", "numpy", "pyarrow.parquet", "pyarrow.compute", "PIL.Image", "pydantic",
    "transformers", "transformers.trainer", "transformers.models.llava.modeling_llava", "transformers.models.clip",
    "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "accelerate", "open_clip", "faiss",
    "matplotlib.backends.backend_svg", "jinja2", "psutil", "surf.cli", "surf.store", "surf.models.lvlm", "surf.models.shared",
    "surf.models.clip", "surf.training.trainer", "surf.training.network",
)  # fmt: skip


def shell_functions(path: Path) -> str:
    """Bash functions that take the places of `python` and, of one process, `torchrun`."""
    ask = f'"{sys.executable}" -IS "{Path(__file__).resolve()}" --ask "{path}" "$@"'
    return f'python() {{ {ask}; }}\ntorchrun() {{ while [ "$1" != -m ]; do shift; done; python "$@"; }}\n'


def ask(path: str, words: list[str]) -> int:
    """Have a command run; returns its exit code. Signals are passed on."""
    line = socket.socket(socket.AF_UNIX)
    try:
        if words[:1] != ["-m"] or not words[1].startswith("surf."):
            raise ConnectionError("no stage")
        line.connect(path)
    except OSError:
        os.execv(sys.executable, [sys.executable, *words])
    pid, early = 0, list[int]()

    def forward(number: int, _: Any) -> None:
        if not pid:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in SIGNALS:  # before there is a process: it may be told to stop as soon as it has begun
        signal.signal(number, forward)
    request = json.dumps({"words": words[1:], "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    socket.send_fds(line, [len(request).to_bytes(8, "big")], [0, 1, 2])
    line.sendall(request)
    pid = int.from_bytes(_exactly(line, 8), "big")
    for number in early:
        forward(number, None)
    return int.from_bytes(_exactly(line, 8), "big")


def serve(path: str) -> None:
    """Fork a process for everyone who asks, until the parent of this one ends."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # imports ask for GPUs; CUDA itself would not survive the fork
    for name in MODULES:
        with contextlib.suppress(ImportError):
            __import__(name)
    door = socket.socket(socket.AF_UNIX)
    Path(path).unlink(missing_ok=True)
    door.bind(path)
    door.listen(256)
    parent = os.getppid()
    watched = selectors.DefaultSelector()
    watched.register(door, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # handle of a process: its number, who asked for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while os.getppid() == parent:
            for key, _ in watched.select(timeout=1.0):
                if key.fileobj is door:
                    line, _ = door.accept()
                    try:
                        pid = _start(line, door)
                    except (OSError, ValueError):  # who asked for it has died already
                        line.close()
                        continue
                    handle = os.pidfd_open(pid)
                    running[handle] = pid, line
                    watched.register(handle, selectors.EVENT_READ)
                    watched.register(line, selectors.EVENT_READ, handle)
                elif isinstance(key.fileobj, int):  # a process has ended
                    _ended(*running.pop(key.fileobj), watched)
                    watched.unregister(key.fileobj)
                    os.close(key.fileobj)
                elif key.data in running:  # who asked for it has died
                    watched.unregister(key.fileobj)
                    os.kill(running[key.data][0], signal.SIGKILL)
    finally:
        for pid, _ in running.values():
            os.kill(pid, signal.SIGKILL)


def _ended(pid: int, line: socket.socket, watched: selectors.BaseSelector) -> None:
    """Tell who asked for it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        line.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big"))
    with contextlib.suppress(KeyError):
        watched.unregister(line)
    line.close()


def _start(line: socket.socket, door: socket.socket) -> int:
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    request = json.loads(_exactly(line, int.from_bytes(size, "big")))
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        line.sendall(pid.to_bytes(8, "big"))
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        door.close()
        line.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os._exit(_run(request["words"]))
    except BaseException:
        os._exit(70)


def _run(words: list[str]) -> int:
    """Do what `python -m` does; returns the exit code."""
    import atexit
    import runpy
    import threading
    import traceback

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, "-m", *words])
    sys.argv = list(words)
    code: Any = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _exactly(line: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = line.recv(size - len(data))
        if not part:
            raise ConnectionError("the process that starts stages has ended")
        data += part
    return data


if __name__ == "__main__":
    if sys.argv[1] == "--ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    serve(sys.argv[1])
