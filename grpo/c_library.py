"""Compile the C files of this package with the machine's C compiler, once, and load them."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "rollout" / "c"
# Without -ffast-math, so that numbers are added in the order of the C files. With gcc, OpenMP's library is the one that
# torch's wheels for processors have loaded already.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")


class CompilerError(RuntimeError):
    """The C files cannot be compiled or loaded on this machine."""


class NoCompilerError(CompilerError):
    """There is no C compiler, or it is not used on this system."""


@functools.cache
def load_library(sources: Path = SOURCES) -> ctypes.CDLL:
    """The compiled C files of a folder, from the user's cache folder if they are there. Raises CompilerError."""
    if sys.platform != "linux":
        raise NoCompilerError("compiled code is only supported on Linux")
    compiler = _compiler()
    files = sorted(sources.glob("*.c"))
    try:
        library = _cache_folder() / f"{_digest(sources, compiler)}.so"
        if not library.exists():
            _compile(compiler, files, library)
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # damaged, for example by a power failure
            _compile(compiler, files, library)
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilerError(str(error)) from None


def compiler_version() -> str:
    """The first line of what the C compiler says about its version; "none" without one."""
    try:
        return next(iter(_version(_compiler()).splitlines()), "unknown")
    except CompilerError:
        return "none"


def _compiler() -> list[str]:
    try:
        name, *arguments = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise CompilerError(f"CC={os.environ['CC']}: {error}") from None
    found = shutil.which(name)
    if found is None:
        raise NoCompilerError(f"there is no C compiler named {name}")
    return [found, *arguments]


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, check=False)
    except OSError as error:
        raise CompilerError(str(error)) from None
    return done.stdout.decode(errors="replace")


def _cache_folder() -> Path:
    """A folder that only this user can write to; one for this process if there is none in the home directory."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid == os.getuid() and not facts.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home directory
        pass
    return Path(_folder_of_process().name)


@functools.cache
def _folder_of_process() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="grpo-")  # is removed when the process ends


def _digest(sources: Path, compiler: list[str]) -> str:
    """Changes with everything that the library depends on: the files, the flags, the compiler and the processor."""
    kinds = ("model name", "flags", "CPU part", "Features")
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(kinds)}
    facts = (_version(compiler), *compiler, *FLAGS, *sorted(processor))
    files = [file.read_bytes() for file in sorted(sources.iterdir())]
    return hashlib.sha256(b"\0".join([*(fact.encode() for fact in facts), *files])).hexdigest()[:16]


def _compile(compiler: list[str], files: list[Path], library: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(descriptor)
    try:
        command = [*compiler, *FLAGS, *map(str, files), "-o", name]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[0] if lines else f"exit code {done.returncode}"
            raise CompilerError(f"{compiler[0]} cannot compile {files[0].parent}: {reason}")
        Path(name).replace(library)  # in one step, for other processes that load it
    finally:
        Path(name).unlink(missing_ok=True)
