"""`not started` means the same on a GPU, where nobody counts launches and copies, as in the emulation, which does."""

import re
from pathlib import Path

import numpy as np
import pytest
from lab_files import CUDA_LABS, anonymous_copy, needs_compiler, stub_path

from common.grading import build, gpu, run, sanitizer
from common.grading.grader import Options, grade
from common.grading.lab import OUTPUT_FILL, ROOT, get, inputs_of
from common.grading.outcome import Outcome

NOT_STARTED, NOTHING_WRITTEN = (Outcome.NOT_STARTED, "not-started"), (Outcome.WRONG, "nothing-written")
KERNEL = """#include "silu.h"
#include <cuda_runtime.h>
__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) output[i] = input[i] / (1.0f + expf(-input[i]));
}
"""
OWN = "float *own; cudaMalloc(&own, n * sizeof(float)); "


def silu(body: str, before: str = KERNEL) -> str:
    return f"{before}void silu(float *input, float *output, int n) {{ {body} }}\n"


def column(body: str) -> str:
    check = "#define CHECK(call) if ((call) != cudaSuccess) return\n"
    head = "void copy_first_column(float *h_A, float *d_A, int rows, int cols)"
    return f"{check}{head} {{ float *own; cudaMalloc(&own, rows * sizeof(float)); {body} }}\n"


def graded_as_on_a_gpu(monkeypatch, lab_name: str, source: Path):
    """The grader's way on a GPU, of which every case gives the output as it was filled, and no count of launches."""
    lab = get(lab_name)

    def untouched(command, cases, schedule, work, chosen=None, *, gpu=False):
        sizes = [np.size(lab.expected(case, inputs_of(lab, case))) for case in cases]
        outputs = [np.full(size, OUTPUT_FILL[schedule.fill], np.uint32).view(np.float32) for size in sizes]
        return [run.CaseRun(output=output, ran=True) for output in outputs]

    monkeypatch.setattr(gpu, "present", lambda need_nvcc=True: True)
    monkeypatch.setattr(build, "build_gpu", lambda lab, source, work: build.Built({"gpu": work / "gpu"}))
    monkeypatch.setattr(run, "run_cases", untouched)
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    report = grade(lab, source, Options(quick=True))
    assert report.machine == "GPU"
    return report.outcome, report.lesson.id


@pytest.mark.parametrize("lab_name, name", [("silu/CUDA", "own_output"), ("host_GPU", "own_buffer")])
def test_what_is_written_elsewhere_is_wrong_on_a_gpu(monkeypatch, lab_name, name):
    source = anonymous_copy(ROOT / "tests/grading/wrong" / lab_name / f"{name}.cu")
    assert graded_as_on_a_gpu(monkeypatch, lab_name, source) == NOTHING_WRITTEN


@pytest.mark.parametrize("lab_name", CUDA_LABS)
@pytest.mark.parametrize("changed", ["as handed out", "without comments", "reformatted"])
def test_a_stub_in_which_nothing_was_written_is_not_started_on_a_gpu(monkeypatch, tmp_path, lab_name, changed):
    text = stub_path(lab_name).read_text()
    if changed != "as handed out":
        text = re.sub(r"//[^\n]*", "", text)
    if changed == "reformatted":
        text = re.sub(r" *\{\s*", "\n{\n\n", text)
    (tmp_path / get(lab_name).source).write_text(text)
    assert graded_as_on_a_gpu(monkeypatch, lab_name, tmp_path / get(lab_name).source) == NOT_STARTED


LAUNCH = "silu_kernel<<<n / 256 + 1, 256>>>"
EMPTY = KERNEL.replace("output[i] = ", "float unused = ")
AGREED = {
    "a kernel, no launch": (silu(""), NOT_STARTED),
    "a launch in comments": (silu(f"// {LAUNCH}(input, output, n);\n/* {LAUNCH}(input, output, n); */"), NOT_STARTED),
    "a launch in a string": (silu(f'const char *hint = "{LAUNCH}";'), NOT_STARTED),
    "sizes only": (silu("(void)input; int threads = 256; int blocks = (n + threads - 1) / threads;"), NOT_STARTED),
    "memory only": (silu(f"{OWN} cudaMemcpyKind kind = cudaMemcpyHostToDevice; cudaFree(own);"), NOT_STARTED),
    "a variable of the device's": (
        silu("float zero = 0; cudaMemcpyToSymbol(total, &zero, sizeof zero);", f"{KERNEL}__device__ float total;\n"),
        NOT_STARTED,
    ),
    "an empty kernel": (silu(f"{LAUNCH}(input, output, n);", EMPTY), NOTHING_WRITTEN),
    "a launch in a macro": (
        silu(f"{OWN} GO(input, own, n);", f"{KERNEL}#define GO(...) {LAUNCH}(__VA_ARGS__)\n"),
        NOTHING_WRITTEN,
    ),
    "a launch in another function": (
        silu(f"{OWN} go(input, own, n);", f"{KERNEL}void go(float *x, float *y, int n) {{ {LAUNCH}(x, y, n); }}\n"),
        NOTHING_WRITTEN,
    ),
    "a cooperative launch": (
        silu(
            f"{OWN} void *all[] = {{&input, &own, &n}};"
            "cudaLaunchCooperativeKernel((void *)silu_kernel, dim3(1), 256, all, 0, 0);"
        ),
        NOTHING_WRITTEN,
    ),
    "a copy": (column("CHECK(cudaMemcpyAsync(own, h_A, rows * 4, cudaMemcpyHostToDevice));"), NOTHING_WRITTEN),
    "memory that is set": (column("cudaMemset (own, 0, rows * 4);"), NOTHING_WRITTEN),
}


@needs_compiler
@pytest.mark.parametrize("text, want", [pytest.param(*given, id=name) for name, given in AGREED.items()])
def test_both_machines_agree(monkeypatch, tmp_path, text, want):
    lab_name, case = ("silu/CUDA", "n=33") if "silu" in text else ("host_GPU", "rows=33,cols=5")
    source = tmp_path / get(lab_name).source
    source.write_text(text)
    # One call of the function: what it leaves allocated is no leak yet.
    emulated = grade(get(lab_name), source, Options(cases=(case,), use_gpu=False, nvcc=False))
    assert (emulated.outcome, emulated.lesson.id) == want, emulated.lesson
    assert graded_as_on_a_gpu(monkeypatch, lab_name, source) == want
