"""Compiles a learner's file with its harness: with g++ (or clang++) against the emulation, or with nvcc."""

import difflib
import functools
import hashlib
import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.grading.lab import Lab
from common.grading.qualifiers import missing_qualifier
from common.grading.rewrite import find_lacking, initialised_shared, rewrite
from common.paths import cache_dir

HERE = Path(__file__).resolve().parent
EMULATION, HARNESS = HERE / "emulation", HERE / "harness"
COMPILE_LIMIT_S, COMPILE_LIMIT_MB = 120, 4000

# `checked` finds memory errors; `interleaved` may switch threads at any memory access (emulation/hooks.cpp).
VARIANTS = {
    "checked": ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"],
    "interleaved": ["-fsanitize=thread"],
}
_COMMON_FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-w", "-DTLAB_EMULATION", "-I", str(EMULATION)]


class CompileFailed(Exception):
    """The learner's file does not compile. The message is the compiler's first error, at the learner's line."""


class Blocked(Exception):
    """The file uses something the emulation lacks. The message names the construct and its line."""


@dataclass(frozen=True)
class Built:
    """Executables of the emulation by variant, or one built by nvcc under the key `gpu`."""

    programs: dict[str, Path]


def compiler() -> str:
    """The C++ compiler: $CXX, else g++, else clang++; UserError where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise UserError("no C++ compiler found: install g++ (or clang++), or set CXX")


def nvcc() -> str | None:
    """nvcc on the PATH, else in $CUDA_HOME, else where NVIDIA's installer puts it."""
    if found := shutil.which("nvcc"):
        return found
    return shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


@functools.cache
def gpu_flags() -> tuple[str, ...]:
    """nvcc and its flags for the GPU in this machine: its own code, so that nothing is compiled when it starts."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = {*subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()}
    except (OSError, subprocess.TimeoutExpired):
        found = set()
    one_kind = len(found) == 1 and re.fullmatch(r"\d+\.\d", min(found))
    arch = f"sm_{min(found).replace('.', '')}" if one_kind else "native"
    return (str(nvcc()), "-std=c++17", "-O3", "-w", "-lineinfo", f"-arch={arch}")


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise CompileFailed(f"the compiler did not end within {COMPILE_LIMIT_S} s") from None


def _limit_memory() -> None:
    """Of the compiler over a learner's file: `#include "/dev/zero"` must not take the machine's."""
    resource.setrlimit(resource.RLIMIT_AS, (COMPILE_LIMIT_MB << 20, COMPILE_LIMIT_MB << 20))


@functools.cache
def _locals_hold(cxx: str, value: str) -> tuple[str, ...]:
    """The flag that gives local variables a `value` (pattern, zero) until they are set, where the compiler has it."""
    flag = f"-ftrivial-auto-var-init={value}"
    done = subprocess.run([cxx, flag, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return () if done.returncode else (flag,)


def _cached_object(source: Path, flags: list[str]) -> Path:
    """An object file of our own source: compiled once, and again whenever a source, flag or compiler changes."""
    digest = hashlib.sha256("\0".join([compiler(), *flags]).encode())
    for path in [source, *sorted(EMULATION.rglob("*.h")), *sorted(HARNESS.glob("*.h"))]:
        digest.update(path.read_bytes())
    target = cache_dir() / "grading" / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        done = _run([compiler(), *flags, "-c", str(source), "-o", str(part)], HERE)
        if done.returncode:
            raise UserError(f"{compiler()} cannot compile {source.name}: {_first_error(done.stderr, '')}")
        os.replace(part, target)  # atomic: two graders at once do no harm
    return target


# What g++ says of CUDA that rewrite.py has turned into C++, and what is meant.
_CUDA_ERRORS = (
    (
        r"no matching function for call to .*block_shared<.*",
        "the size of a __shared__ array must be known to the compiler (#define, constexpr, template argument); a size"
        " known at the launch needs `extern __shared__ float name[];` and the launch's third argument, in bytes",
    ),
    (
        r"invalid operands of types ['‘]void ?\(.*operator<<.*",
        "a launch has three angle brackets: kernel<<<blocks, threads>>>(...)",
    ),
    (r"before ['‘]emu['’].*", "before a __syncthreads(), a launch or another word of CUDA"),
)


def _first_error(stderr: str, name: str) -> str:
    """The compiler's first error, at a line of the learner's file if one is named."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line)]
    own = [line for line in errors if name and name in line]
    text = (own or errors or lines or ["the compiler failed without a message"])[0]
    text = text.replace(str(Path(text.split(":")[0]).parent) + "/", "") if ":" in text else text
    for pattern, meaning in _CUDA_ERRORS:
        if match := re.search(pattern, text):
            return text[: match.start()] + meaning
    return text


_UNKNOWN = re.compile(
    r"['‘](?P<a>[\w:]+)['’] (?:was not declared|is not a member|has not been declared|does not name)"
    r"|has no member named ['‘](?P<b>\w+)['’]|(?P<c>[\w/.]+\.(?:h|cuh|hpp)): No such file"
    r"|use of undeclared identifier '(?P<d>[\w:]+)'|['\"](?P<e>[\w/.]+)['\"] file not found"
)
TYPO_RATIO = 0.85  # cudaMalocc is cudaMalloc misspelt (0.9), cudaArray_t is no cudaError_t (0.73)
_CUDA_NAME = re.compile(
    r"^(cuda[A-Z_]|__[a-z]|cg$|cooperative_groups|atomic[A-Z]|make_|tex|surf|(u?(char|short|int|long|longlong)|float|double|half)\d"
    r"|(thread|coalesced|cluster|multi_grid)_group$|(inclusive|exclusive)_scan|invoke_one)"
)
_ROUNDED = re.compile(r"^__[a-z]\w*_r[nzdu]$")  # __frsqrt_rn is near __fsqrt_rn, and no typo
_OF_CUDA = re.compile(r"cooperative_groups::|['‘](?:struct )?cudaDeviceProp|is not a member of ['‘]cg['’]")
_VOID_KERNEL = re.compile(r"no matching function for call to ['‘](cuda\w+)(?:\((?:const )?void ?\*|['’])")
# Names that CUDA had before 9.0, and old tutorials still have.
_REMOVED = {"__shfl", "__shfl_up", "__shfl_down", "__shfl_xor", "__ballot", "__any", "__all"}
_TOOLKIT_HEADER = re.compile(
    r"^(cu|thrust/|nv|mma\.h|cooperative_groups|device_|driver_|host_|vector_|math_constants|sm_|texture_|crt/)"
)


def _lacking_name(stderr: str, source: str) -> str | None:
    """The CUDA name that the emulation's headers do not know, if that is what the first error in `source` is about."""
    first = next((line for line in stderr.splitlines() if re.search(r"\berror\b", line)), "")
    if void := _VOID_KERNEL.search(first):
        return f"{void[1]} with a kernel that is not called by its name"
    match = _UNKNOWN.search(first)
    if match is None:
        return None
    name = next(group for group in match.groups() if group)
    if match["c"] or match["e"]:
        return name if f"<{name}>" in source or _TOOLKIT_HEADER.match(name) else None
    suggested = re.search(r"did you mean ['‘](\w+)['’]", first)
    typo = suggested and difflib.SequenceMatcher(None, name, suggested[1]).ratio() > TYPO_RATIO
    if name in _REMOVED or (typo and not _ROUNDED.match(name)):
        return None
    known = _CUDA_NAME.match(name.split("::")[-1]) or _CUDA_NAME.match(name) or _OF_CUDA.search(first)
    return name if known else None


def _learner_error(stderr: str, source: Path, text: str) -> Exception:
    if name := _lacking_name(stderr, text):
        return Blocked(f"{name} (not in the emulation: grade on a machine with a GPU, or do without it)")
    error = _first_error(stderr, source.name)
    if old := next((name for name in _REMOVED if re.search(rf"['‘]{name}['’]", error)), None):
        error = f"{error.split(';')[0]}: it is gone from CUDA, write {old}_sync(0xffffffff, ...)"
    return CompileFailed(error)


def _second_opinion(error: Exception, lab: Lab, source: Path, work: Path) -> Exception:
    """`error` of the emulation as nvcc sees the file, where it is installed: what is CUDA is its to say."""
    try:
        check_nvcc(source, lab.folder, work)
    except CompileFailed as refused:
        return error if isinstance(error, CompileFailed) else refused
    if isinstance(error, CompileFailed):
        return Blocked(f"what this needs, and nvcc takes it (grade on a machine with a GPU): {error}")
    return error


def check_nvcc(source: Path, include: Path, work: Path) -> None:
    """Compiles for sm_80 and sm_90 with nvcc: what g++ accepts need not be CUDA. CompileFailed if it does not."""
    command = [
        str(nvcc()),
        "-std=c++17",
        "-w",
        "-c",
        f"-I{source.parent}",
        f"-I{include}",
        "-o",
        str(work / "nvcc.o"),
        str(source),
    ]
    for arch in ("80", "90"):
        command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    done = _run(command, work)
    if done.returncode:
        raise CompileFailed("nvcc: " + _first_error(done.stderr, source.name))


def build_emulated(lab: Lab, source: Path, work: Path, *, ask_nvcc: bool = False) -> Built:
    """Both variants of the emulated program. Raises Blocked or CompileFailed; ask_nvcc: nvcc decides between them."""
    text = source.read_text(errors="replace")
    if missing := missing_qualifier(text):
        if not ask_nvcc:
            raise CompileFailed(f"{source.name}:{missing[0]}: error: {missing[1]}")
        check_nvcc(source, lab.folder, work)  # it knows; what it takes goes on
    failed: Exception | None = None
    if lacking := find_lacking(text):
        failed = Blocked(
            f"{lacking.construct} (line {lacking.line}; not in the emulation: grade on a machine with a GPU)"
        )
    elif line := initialised_shared(text):
        failed = CompileFailed(
            f"{source.name}:{line}: error: a __shared__ variable cannot be given a value where it is declared: let one"
            " thread write it, then __syncthreads()"
        )
    else:
        # A variable that nobody sets must not be right by luck.
        failed = _compile_emulated(lab, source, text, work, _locals_hold(compiler(), "pattern"))
    if failed:
        raise _second_opinion(failed, lab, source, work) if ask_nvcc else failed
    return Built({variant: _link_emulated(lab, variant, source, work) for variant in VARIANTS})


def build_zeroed(lab: Lab, source: Path, work: Path) -> Path | None:
    """`checked` again, but a local variable that nobody set holds 0, not a pattern; None if the compiler cannot."""
    if not (flag := _locals_hold(compiler(), "zero")):
        return None
    work.mkdir(exist_ok=True)
    if _compile_emulated(lab, source, source.read_text(errors="replace"), work, flag, ("checked",)):
        return None
    return _link_emulated(lab, "checked", source, work)


def _compile_emulated(
    lab: Lab,
    source: Path,
    text: str,
    work: Path,
    locals_flag: tuple[str, ...],
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> Exception | None:
    """Object files of the variants; what is wrong with the learner's file, or None."""
    translated = work / (source.stem + ".emulated.cpp")
    translated.write_text(rewrite(text, source.name))
    include = ["-I", str(source.parent), "-I", str(lab.folder), "-include", "cuda_runtime.h"]
    jobs = {}
    for variant in variants:
        target, flags = work / f"{variant}.o", [*_COMMON_FLAGS, *VARIANTS[variant], *locals_flag]
        command = [compiler(), *flags, *include, "-c", str(translated), "-o", str(target)]
        jobs[variant] = subprocess.Popen(
            command, cwd=work, stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=_limit_memory
        )
    failed = None
    for job in jobs.values():
        try:
            _, stderr = job.communicate(timeout=COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            job.kill()
            raise CompileFailed(f"the compiler did not end within {COMPILE_LIMIT_S} s") from None
        if job.returncode and failed is None:
            failed = _learner_error(stderr, source, text)
    return failed


def _link_emulated(lab: Lab, variant: str, source: Path, work: Path) -> Path:
    # The memory checks also go into the runtime itself; the hooks only into the learner's code.
    flags = VARIANTS[variant] if variant == "checked" else []
    own = [EMULATION / "scheduler.cpp", EMULATION / "runtime_api.cpp", HARNESS / lab.harness]
    own += [EMULATION / "hooks.cpp"] if variant == "interleaved" else []
    objects = [str(_cached_object(path, [*_COMMON_FLAGS, *flags])) for path in own]
    program = work / variant
    done = _run([compiler(), *flags, str(work / f"{variant}.o"), *objects, "-o", str(program), "-lpthread"], work)
    if done.returncode:
        raise _link_error(lab, done.stderr, source)
    return program


def _link_error(lab: Lab, stderr: str, source: Path) -> Exception:
    if re.search(rf"undefined (reference|symbols?).*{lab.function}|{lab.function}.*undefined", stderr, re.S):
        return CompileFailed(f"{source.name}: no function with the signature `{lab.signature}`")
    if "multiple definition" in stderr or "duplicate symbol" in stderr:
        name = re.search(r"(?:multiple definition of|duplicate symbol) ['`‘]?([\w:]+)", stderr)
        return CompileFailed(
            f"{source.name}: defines {f'`{name[1]}`' if name else 'something'}, and so does the program round it:"
            " rename it, or make it static; a main() belongs into main.cu"
        )
    return CompileFailed(_first_error(stderr, source.name))


def build_gpu(lab: Lab, source: Path, work: Path) -> Built:
    """The harness and the learner's file built by nvcc for the GPU in this machine. Raises CompileFailed."""
    include = ["-I", str(source.parent), "-I", str(lab.folder), "-I", str(HARNESS)]
    program = work / "gpu"
    sources = [str(source), str(HARNESS / lab.harness)]
    done = _run([*gpu_flags(), *include, "-x", "cu", "-o", str(program), *sources], work)
    if done.returncode:
        raise _link_error(lab, done.stderr, source)
    return Built({"gpu": program})


def build_for_timing(lab: Lab, source: Path, work: Path) -> Path:
    """The learner's file and harness/timing.cu as a shared library. Raises CompileFailed."""
    library = work / f"{source.stem}.so"
    include = ["-I", str(source.parent), "-I", str(lab.folder)]
    done = _run([*gpu_flags(), *_LIBRARY, *include, "-o", str(library), str(source), str(HARNESS / "timing.cu")], work)
    if done.returncode:
        raise CompileFailed(_first_error(done.stderr, source.name))
    return library


def timing_library(work: Path) -> Path:
    """harness/timing.cu alone: the copy. UserError where nvcc cannot build it."""
    library = work / "timing.so"
    done = _run([*gpu_flags(), *_LIBRARY, "-o", str(library), str(HARNESS / "timing.cu")], work)
    if done.returncode:
        raise UserError(f"nvcc cannot build timing.cu: {_first_error(done.stderr, 'timing.cu')}")
    return library


# Calls on the per-thread default stream can be captured into a graph (harness/timing.cu).
_LIBRARY = ["--default-stream", "per-thread", "-shared", "-Xcompiler", "-fPIC"]
