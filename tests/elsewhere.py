"""Run commands of ours as on macOS or Windows, as far as Linux can tell what those lack.

    python -X warn_default_encoding -m tests.elsewhere windows < COMMANDS

COMMANDS is a JSON list of argument lists, or of ["-c", CODE] for Python; the answer is a list of
exit codes, standard outputs and standard errors. What the platform lacks of modules, functions and
constants is hidden from the package, `/proc`, `/sys` and `/dev/shm` from everybody. On Windows a
folder cannot be opened, a file that is open cannot be renamed, modes tell nothing about other
users, and a pipe takes the characters of cp1252 only.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import shutil
import signal
import stat
import sys
import types
import warnings
from typing import Any

HIDDEN_FOLDERS = ("/proc", "/sys", "/dev/shm")
# What ships with a platform's Python lacks; macOS first, Windows has neither.
MODULES = {"macos": "spwd", "windows": "fcntl grp posix pty pwd resource spwd syslog termios tty"}
FUNCTIONS = {
    "macos": "posix_fadvise posix_fallocate sched_getaffinity sched_setaffinity",
    "windows": """chown chroot fchmod fchown fork forkpty getegid geteuid getgid getloadavg getpgid
        getuid killpg lchown mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn
        posix_spawnp pread pwrite register_at_fork sched_getaffinity sched_setaffinity
        sched_yield setgid setsid setuid statvfs sync uname wait wait4""",
}
CONSTANTS = {
    "macos": "O_DIRECT O_LARGEFILE O_PATH O_TMPFILE",
    "windows": """O_CLOEXEC O_DIRECTORY O_DIRECT O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE
        POSIX_SPAWN_CLOSE POSIX_SPAWN_DUP2 POSIX_SPAWN_OPEN WNOHANG""",
}
SIGNALS = {  # those of Windows are all that it has
    "macos": set(signal.Signals.__members__) - {"SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL"},
    "windows": {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"},
}
SIGNAL_FUNCTIONS = "alarm pthread_kill pthread_sigmask setitimer sigwait sigpending SIG_BLOCK"
# The libraries are loaded before anything is hidden: they have builds of their own elsewhere.
LIBRARIES = (
    *("asyncio", "concurrent.futures.process", "multiprocessing.popen_spawn_posix"),
    *("multiprocessing.queues", "multiprocessing.synchronize", "tarfile"),
    *("aiohttp", "click", "filelock", "google.protobuf.text_format", "grpc.aio", "msgspec"),
    *("numpy", "onnx.reference", "onnxruntime", "PIL.ImageOps", "tabulate"),
    *("tritonclient.grpc.aio", "tritonclient.http.aio"),
)


class Without(types.ModuleType):
    """A module that lacks names, or has other values for them."""

    def __init__(self, module: types.ModuleType, lacking: set[str], **values: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(values, _module=module, _lacking=lacking)

    def __getattr__(self, name: str) -> Any:
        if name in self._lacking:
            raise AttributeError(f"module {self.__name__!r} has no {name} on this platform")
        return getattr(self._module, name)


def hide(system: str) -> None:
    """Hide from modules that are imported later what a platform lacks."""
    lacking = {*FUNCTIONS[system].split(), *CONSTANTS[system].split()}
    numbers = {name for name in vars(signal) if name.startswith("SIG") and name[3] != "_"}
    unsignalled = numbers - SIGNALS[system]
    if system == "windows":
        unsignalled |= {*SIGNAL_FUNCTIONS.split(), "SIG_SETMASK", "SIG_UNBLOCK"}
        behave_like_windows()
    sys.modules.update(dict.fromkeys(MODULES[system].split()))  # type: ignore[arg-type]  # None
    sys.modules["os"] = Without(os, lacking)
    sys.modules["signal"] = Without(signal, unsignalled)
    name = {"macos": "darwin", "windows": "win32"}[system]
    sys.modules["sys"] = Without(sys, {"getwindowsversion"}, platform=name)
    full = {"macos": "Darwin", "windows": "Windows"}[system]
    sys.modules["platform"] = Without(platform, set(), system=lambda: full)
    sys.addaudithook(refuse_hidden)


def refuse_hidden(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to open or list what is below a hidden folder."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if path.startswith(HIDDEN_FOLDERS):
            raise FileNotFoundError(2, "No such file or directory", path)


def behave_like_windows() -> None:
    """Let files behave as on Windows, for everybody in this process."""
    import fcntl

    real_open, real_sync = os.open, os.fsync

    def refuse_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, flags, mode, dir_fd=dir_fd)

    def refuse_sync(fd: Any) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_sync(fd)

    def refuse_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            for path in map(os.fsdecode, arguments[:2]):
                name = os.path.realpath(path)
                for number in range(3, 256):
                    with contextlib.suppress(OSError):
                        held = os.readlink(f"/proc/self/fd/{number}")
                        if held == name or held.startswith(f"{name}/"):
                            raise Held(path)

    def show_mode(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> os.stat_result:
            status = function(*arguments, **options)
            bits = 0o777 if stat.S_ISDIR(status.st_mode) else 0o666
            return os.stat_result((status.st_mode | bits, *status[1:]), vars_of(status))

        return call

    def vars_of(status: os.stat_result) -> dict[str, Any]:
        return {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}

    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # it opens folders
    os.open, os.fsync = refuse_open, refuse_sync
    os.stat, os.lstat, os.fstat = map(show_mode, (os.stat, os.lstat, os.fstat))
    sys.addaudithook(refuse_rename)


class Held(Exception):
    """A file that is open is renamed: Windows refuses that."""


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command; return its exit code, standard output and standard error."""
    from pipeline.cli.main import main

    written = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(content, "cp1252", newline="") for content in written]
    streams[1].reconfigure(errors="backslashreplace")  # as Python's standard error
    code: Any = None
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            if arguments[0] == "-c":
                exec(arguments[1], {})
                code = 0
            else:
                main(arguments)
        except SystemExit as end:
            code = end.code
    for stream in streams:
        stream.flush()
    out, err = (content.getvalue().decode("cp1252") for content in written)
    return code, out, err


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    commands = json.load(sys.stdin)
    hide(sys.argv[1])
    warnings.filterwarnings("error", category=EncodingWarning, module=r"pipeline\.")
    print(json.dumps([run(command) for command in commands]))
