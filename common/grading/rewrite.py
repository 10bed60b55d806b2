"""Turns a CUDA source into C++ that the emulation's headers understand, keeping every line where it was.

Only three things in CUDA are not C++: kernel launches (`kernel<<<grid, block>>>(x)`), `__shared__` declarations, and
kernels passed as `void *`. Everything else is macros and functions in `emulation/`. The text in between is copied,
and a `#line` directive names the learner's file, so that a compiler error or a crash points into it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# What the emulation does not have. A file that uses one of these is `blocked`, not wrong: the name is reported.
_LACKING = [
    (re.compile(r"\basm\s*(?:volatile\s*)?\("), "inline PTX (asm)"),
    (
        re.compile(
            r"#\s*include\s*<(cub/[^>]*|thrust/[^>]*|cuda/[^>]*|mma\.h|cuda_fp16\.h|cuda_bf16\.h|cuda_pipeline[^>]*)>"
        ),
        None,
    ),
    (re.compile(r"\b(?:nv)?cuda::[A-Za-z_]+"), None),
    (re.compile(r"\b(?:cub|thrust)::[A-Za-z_]+"), None),
    (
        re.compile(
            r"\b(?:cudaGraph|cudaStreamBeginCapture|cudaLaunchKernelEx|cudaMallocManaged|cudaMallocPitch|cudaMemcpy3D)\w*"
        ),
        None,
    ),
    (re.compile(r"\b__(?:pipeline|reduce|match)_\w+"), None),
    (
        re.compile(
            r"\b(?:coalesced_threads|labeled_partition|binary_partition|memcpy_async|this_cluster|__cluster_dims__)\b"
        ),
        None,
    ),
]


@dataclass(frozen=True)
class Lacking:
    """A construct that the emulation lacks, and the line that uses it."""

    construct: str
    line: int


def blank_comments(source: str) -> str:
    """The source with comments and the insides of strings replaced by spaces; same length, same lines."""
    token = re.compile(r'//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)

    def blank(match: re.Match) -> str:
        text = match.group()
        inner = re.sub(r"[^\n]", " ", text)
        return text[0] + inner[1:-1] + text[-1] if text[0] in "\"'" else inner

    return token.sub(blank, source)


def find_lacking(source: str) -> Lacking | None:
    """The first construct in `source` that the emulation cannot run, or None."""
    code = blank_comments(source)
    found = []
    for pattern, name in _LACKING:
        if match := pattern.search(code):
            found.append((match.start(), name or (match.group(1) if match.lastindex else match.group())))
    if not found:
        return None
    start, construct = min(found)
    return Lacking(construct.strip(), source.count("\n", 0, start) + 1)


_WORK = re.compile(
    r"<<<|\bcuda(?:Launch|GraphLaunch|Memset|Memcpy(?!ToSymbol|FromSymbol))\w*\s*[(<]|\b(?:cub|thrust)::"
)


def has_launch_or_copy(source: str) -> bool:
    """Whether a launch or a copy stands anywhere in the code, also in a macro or a function that another calls.

    As in the emulation's count, a kernel without one does nothing yet, nor does what only sets variables or allocates.
    """
    return _WORK.search(blank_comments(source)) is not None


def initialised_shared(source: str) -> int | None:
    """The line of the first `__shared__ float x = ...`, which is no CUDA; None if there is none."""
    match = re.search(r"\b__shared__\b[^;={}()<>]*=(?!=)", blank_comments(source))
    return match and source.count("\n", 0, match.start()) + 1


def closing_bracket(code: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, or -1."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    depth = 0
    for i in range(start, len(code)):
        if code[i] in pairs:
            depth += 1
        elif code[i] in pairs.values():
            depth -= 1
            if depth == 0:
                return i
    return -1


def _kernel_name_start(code: str, end: int) -> int:
    """Where the kernel expression that ends at `end` (before `<<<`) begins: an identifier, `::`, template arguments."""
    i = end
    while i > 0 and code[i - 1].isspace():
        i -= 1
    if i > 0 and code[i - 1] == ">":
        depth = 0
        while i > 0:
            i -= 1
            depth += (code[i] == ">") - (code[i] == "<")
            if depth == 0:
                break
    while i > 0 and (code[i - 1].isalnum() or code[i - 1] in "_:"):
        i -= 1
    return i


def _rewrite_launches(source: str, code: str) -> str:
    """`k<T><<<a, b>>>(x)` becomes `emu::Launch(a, b).call([=](auto... emu_a) { k<T>(emu_a...); }, x)`."""
    out, position = [], 0
    while (start := code.find("<<<", position)) >= 0:
        end = code.find(">>>", start)
        opening = code.find("(", end) if end >= 0 else -1
        closing = closing_bracket(code, opening) if opening >= 0 and not code[end + 3 : opening].strip() else -1
        if closing < 0:  # not a launch that can be parsed: the compiler will say so
            break
        name = _kernel_name_start(code, start)
        arguments = source[opening + 1 : closing]
        out.append(source[position:name])
        out.append(
            f"emu::Launch({source[start + 3 : end]}).call([=](auto... emu_a) {{ {source[name:start]}(emu_a...); }}"
        )
        out.append(source[end + 3 : opening])
        out.append((", " if code[opening + 1 : closing].strip() else "") + arguments + ")")
        position = closing + 1
    out.append(source[position:])
    return "".join(out)


def _split_declarators(text: str) -> list[str]:
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [*parts, text[last:]]


_DECLARATION = re.compile(r"(extern\s+)?\b(?:static\s+)?__shared__\b([^;{}]*);")
_DECLARATOR = re.compile(r"\s*(?P<stars>[*\s]*)(?P<name>[A-Za-z_]\w*)\s*(?P<dims>(?:\[[^\]]*\]\s*)*)$")


def _shared_declaration(match: re.Match, in_function: bool) -> str:
    body = re.sub(r"__align__\s*\([^)]*\)|alignas\s*\([^)]*\)", "", match.group(2))
    first, *others = _split_declarators(body)
    head = re.match(
        r"(?P<type>.*[\w>*\s])(?P<name>\b[A-Za-z_]\w*)\s*(?P<dims>(?:\[[^\]]*\]\s*)*)$", first.strip(), re.S
    )
    if head is None or (not in_function and not match.group(1)):
        return match.group()  # the compiler will point at it: `__shared__` is no C++ name
    kind, lines = head["type"].strip(), "\n" * match.group().count("\n")
    out = []
    for declarator in [f"{head['name']}{head['dims']}", *others]:
        part = _DECLARATOR.match(declarator.replace("\n", " "))
        if part is None:
            return match.group()
        name, dims = part["name"], part["dims"].strip()
        one = (kind + " " + part["stars"].strip()).replace("\n", " ").strip()
        if match.group(1):
            out.append(
                f"{one} *{name} = emu::dynamic_shared<{one}>();"
                if in_function
                else f"static emu::DynamicShared<{one}> {name};"
            )
        else:
            out.append(
                f"static char emu_site_{name}; auto &{name} = emu::block_shared<{one} {dims}>(&emu_site_{name});"
            )
    return " ".join(out) + lines


def _rewrite_shared(source: str) -> str:
    code = blank_comments(source)
    out, position = [], 0
    for match in _DECLARATION.finditer(code):
        # Depth of braces tells a declaration in a function from one at file scope.
        in_function = code.count("{", 0, match.start()) > code.count("}", 0, match.start())
        out.append(source[position : match.start()] + _shared_declaration(match, in_function))
        position = match.end()
    return "".join(out) + source[position:]


_TAKES_KERNEL = r"cuda(?:LaunchCooperativeKernel|LaunchKernel|FuncSetAttribute|OccupancyMax\w+)\s*\("
_CASTS = [
    re.compile(r"\(\s*(?:const\s+)?void\s*\*\s*\)\s*(?=&?\s*[A-Za-z_])"),
    re.compile(r"reinterpret_cast\s*<\s*(?:const\s+)?void\s*\*\s*>\s*(?=\()"),
]


def _rewrite_kernel_pointers(source: str) -> str:
    """Drops the `(void *)` before a kernel's name: the emulation needs its type to unpack the arguments."""
    for match in reversed(list(re.finditer(_TAKES_KERNEL, source))):
        closing = closing_bracket(source, match.end() - 1)
        call = source[match.end() : closing]
        # The kernel is the first argument, or an occupancy function's second; the array of arguments keeps its type.
        cut = call.find("{") if "{" in call else len(call)
        for cast in _CASTS:
            call = cast.sub("", call[:cut], count=1) + call[cut:]
            cut = call.find("{") if "{" in call else len(call)
        source = source[: match.end()] + call + source[closing:]
    return source


def rewrite(source: str, name: str | Path) -> str:
    """C++ for the emulation, from CUDA `source`; `name` is what diagnostics call the file."""
    text = _rewrite_shared(source)
    text = _rewrite_launches(text, blank_comments(text))
    text = _rewrite_kernel_pointers(text)
    path = str(name).replace("\\", "/")
    return f'#line 1 "{path}"\n{text}'
