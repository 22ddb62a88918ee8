"""Compile every kernel with NVRTC as CuPy would, on a machine without a GPU, and read what each needs of a card.

Needs a wheel with libnvrtc (extra ``test``), no headers, no driver and no CuPy. Asked for ``sm_75`` rather than
``compute_75``, NVRTC also runs ptxas, which allots registers and reports spills.

    python -m tests.autograd.nvrtc            compare with registers.json, the expectation
    python -m tests.autograd.nvrtc --write    write it, after a change on purpose
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from functools import cache
from pathlib import Path

from autograd.cuda.source import OPTIONS, manifest

EXPECTED = Path(__file__).with_name("registers.json")
ARCHITECTURES = ("sm_75", "sm_90")
VERSION = (12, 4)  # of the expectation
LIMIT = 48 * 1024  # of shared memory; NVRTC 12.4 lets more pass, and the launch fails
CUPY = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds to every compilation


@cache
def library() -> ctypes.CDLL | None:
    """libnvrtc from a wheel, or None."""
    for root in [Path(p, "nvidia") for p in sys.path if p.endswith(("site-packages", "dist-packages"))]:
        for path in sorted(root.glob("**/libnvrtc.so.*"), reverse=True):  # the wheel of CUDA 12 before that of 13
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # some wheels do not find their own
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            nvrtc = ctypes.CDLL(str(path))
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            return nvrtc
    return None


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compiled(text: str, architecture: str, options: tuple[str, ...] = ()) -> tuple[bool, str]:
    """Whether the text compiles, and the log, which holds the errors or ptxas's report."""
    nvrtc, flags = library(), [f"--gpu-architecture={architecture}", "-Xptxas=-v", *OPTIONS, *CUPY, *options]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    try:
        array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        result = nvrtc.nvrtcCompileProgram(program, len(flags), array)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        return result == 0, log.value.decode() or nvrtc.nvrtcGetErrorString(result).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def resources(log: str) -> dict[str, dict[str, int]]:
    """ptxas's report: what each kernel needs."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        def number(pattern, part=part):
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found[part.split("'")[0]] = {
            "registers": number(r"Used (\d+) registers"), "spilled": number(r"(\d+) bytes spill stores"),
            "stack": number(r"(\d+) bytes stack frame"), "shared": number(r"(\d+) bytes smem")}
    return found


def table() -> dict[str, dict[str, dict[str, int]]]:
    """{kernel and options: {architecture: what it needs}} of all kernels; an error of the compiler is raised."""
    found: dict = {}
    for source, options in manifest():
        for architecture in ARCHITECTURES:
            good, log = compiled(source.text, architecture, options)
            if not good:
                raise AssertionError(f"{source}, {options}, {architecture}:\n{log}")
            for kernel, needs in resources(log).items():
                found.setdefault(" ".join([kernel, *options]), {})[architecture] = needs
    return found


def registers(found) -> dict[str, dict[str, int]]:
    return {kernel: {a: needs["registers"] for a, needs in by.items()} for kernel, by in sorted(found.items())}


def main() -> None:
    from tests.conftest import operators

    operators()
    found = table()
    for kernel, by in sorted(found.items()):
        print(kernel, *(f"{a}: {needs}" for a, needs in by.items()), sep="\n    ")
    if "--write" in sys.argv:
        EXPECTED.write_text(json.dumps(registers(found), indent=1) + "\n", encoding="utf-8")
    else:
        sys.exit(json.loads(EXPECTED.read_text(encoding="utf-8")) != registers(found))


if __name__ == "__main__":
    main()
