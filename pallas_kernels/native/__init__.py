"""Kernels for CPUs in C++, which XLA calls through its foreign function interface.

A kernel is one source file beside its op. The machine's own C++ compiler builds it when it is first chosen, for this
machine's processor, and the library is kept for later processes. Where there is no compiler, an implementation that
needs one refuses.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

HEADERS = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")


def refusal() -> str | None:
    """Why nothing can be built here, if so."""
    if compiler() is not None:
        return None
    if os.environ.get("CXX"):
        return f"CXX={os.environ['CXX']} is not a program"
    return f"it needs a C++ compiler: one of {', '.join(COMPILERS)}, or CXX in the environment"


def compiler() -> str | None:
    """The path of $CXX, or of the first of ``COMPILERS`` that is there."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)


def cache_directory() -> Path:
    """Where built libraries are kept: ``jaxserve/native`` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "native"


@cache
def register(source: Path, function: str) -> str:
    """Builds ``source`` if that was not done before, and gives XLA its handler ``function``; returns the name to call
    it by.

    Raises RuntimeError with what the compiler said if it does not compile.
    """
    library = ctypes.CDLL(str(_built(source)))
    name = f"jaxserve_{function}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    return name


def _built(source: Path) -> Path:
    """The library of a source file; its name tells the sources, the compiler, its flags, the processor and the
    interface that it was built with."""
    program = compiler()
    if program is None:
        raise RuntimeError(f"{source.name}: {refusal()}")
    texts = [path.read_bytes() for path in (source, *sorted(HEADERS.glob("*.h")))]
    compiled_by = subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    described = (*texts, compiled_by, repr(FLAGS).encode(), _processor(), version("jaxlib").encode())
    key = hashlib.sha256(b"\0".join(described)).hexdigest()[:16]
    library = cache_directory() / f"{source.parent.name}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(program, source, library)
    return library


def _compile(program: str, source: Path, library: Path) -> None:
    """Under another name first, since other processes may be building the same."""
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    includes = ["-isystem", jax.ffi.include_dir(), f"-I{HEADERS.parent}"]
    command = [program, *FLAGS, *includes, "-o", str(unfinished), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stderr.strip()}\n"
            "Set CXX to another C++ compiler, or attention_backend='cpu' and matmul_backend='reference' to do without."
        )
    unfinished.replace(library)


def _processor() -> bytes:
    """What -march=native depends on: a home directory may be shared by several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
