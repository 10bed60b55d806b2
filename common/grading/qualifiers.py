"""What g++ cannot see: which functions run on the device. A missing __global__ or __device__ is found in the text.

Only what is certain is reported: a name that stands for several things, or comes from a macro, is left to nvcc.
"""

import re

from common.grading.rewrite import blank_comments, closing_bracket

_NO_FUNCTION = {"if", "for", "while", "switch", "catch", "return", "sizeof", "decltype", "alignas", "defined"}
_WITH_BRACKETS = re.compile(r"\b(?:__launch_bounds__|__align__|alignas)\s*\([^()]*\)")
_FUNCTION = re.compile(
    r"(?:^|(?<=[;{}()#]))(?P<head>[^;{}()#]*?[\w>*&]\s*)\b(?P<name>[A-Za-z_]\w*)\s*\((?P<parameters>[^(){};]*)\)\s*(?:const|noexcept|\s)*\{"
)
_LAUNCH = re.compile(r"\b(?P<name>[A-Za-z_]\w*)\s*(?:<[^<>;(){}]*>\s*)?<<<")


def missing_qualifier(source: str) -> tuple[int, str] | None:
    """(line, what is missing) of the first function that lacks __global__ or __device__; None if none is found."""
    code = _WITH_BRACKETS.sub(lambda match: " " * len(match.group()), blank_comments(source))
    macros = set(re.findall(r"#\s*define\s+(\w+)", code))
    functions: dict[str, list[re.Match]] = {}
    for match in _FUNCTION.finditer(code):
        words = set(re.findall(r"\w+", match["head"]))
        if match["name"] not in _NO_FUNCTION and words and not words & (macros | _NO_FUNCTION | {"else", "new"}):
            functions.setdefault(match["name"], []).append(match)
    once = {name: found[0] for name, found in functions.items() if len(found) == 1 and name not in macros}
    for launch in _LAUNCH.finditer(code):
        name = launch["name"]
        if not (kernel := once.get(name)):
            continue
        if not re.search(rf"__global__[^;{{}}]*\b{name}\s*\(", code):
            return _line(code, kernel), f"`{name}` is launched, so it is __global__ void {name}(...)"
        if "__global__" in kernel["head"] and "void" not in kernel["head"]:
            return _line(code, kernel), f"a kernel returns nothing: __global__ void {name}(...)"
    for caller in (m for found in functions.values() for m in found):
        if not re.search(r"__global__|__device__", caller["head"]):
            continue
        body = code[caller.end() - 1 : closing_bracket(code, caller.end() - 1)]
        for name, called in once.items():
            again = rf"\b{name}\s*=|[\w>&*]\s+{name}\s*[;,({{=]"  # declared in the body: a lambda, a variable
            parameter = re.search(rf"\b{name}\b", caller["parameters"])
            if parameter or _runs_on_device(name, called, code) or re.search(again, body):
                continue
            if call := re.search(rf"(?<![\w.>:]){name}\s*\(", body):
                line = code.count("\n", 0, caller.end() - 1 + call.start()) + 1
                return line, f"`{name}` is called in a kernel, so it is __device__"
    return None


def _line(code: str, function: re.Match) -> int:
    return code.count("\n", 0, function.start("name")) + 1


def _runs_on_device(name: str, function: re.Match, code: str) -> bool:
    declared = re.search(rf"(?:__device__|__global__|constexpr)[^;{{}}]*\b{name}\s*\(", code)
    return bool(declared or re.search(r"__device__|__global__|constexpr", function["head"]))
