"""Correct code that is seldom written is never called wrong; what learners often get wrong at the compiler is named."""

from pathlib import Path

import numpy as np
import pytest
from lab_files import needs_compiler, needs_triton

from common.grading import build
from common.grading.check import evaluate, races
from common.grading.grader import Options, grade
from common.grading.lab import LABS, get, inputs_of
from common.grading.outcome import Outcome
from common.grading.qualifiers import missing_qualifier
from common.grading.run import FIRST, SCHEDULES, CaseRun

OFFLINE = {"use_gpu": False, "nvcc": False}

# One line for every kind of construct: a kernel's body between the sum of a thread's squares and the row's.
ROW = """#include "rms_norm_matrix.h"
#include <cuda_runtime.h>
{before}
__global__ void k(const float *in, const float *w, float *out, int cols, float eps) {{
    const float *x = in + (size_t)blockIdx.x * cols;
    float sum = 0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) sum += x[c] * x[c];
    {combine}
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[(size_t)blockIdx.x * cols + c] = x[c] * scale * w[c];
}}
void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {{
    {launch}
}}
"""
LAUNCH = "k<<<rows, 64>>>(input, weight, output, cols, epsilon);"
ATOMIC = (
    "__shared__ float all; if (threadIdx.x == 0) all = 0; __syncthreads(); atomicAdd(&all, sum); __syncthreads();"
    " float scale = rsqrtf(all / cols + eps);"
)
COOPERATIVE = (
    "#include <cooperative_groups.h>\n#include <cooperative_groups/reduce.h>\nnamespace cg = cooperative_groups;"
)
TILES = """
    __shared__ float parts[32];
    cg::thread_block block = cg::this_thread_block();
    cg::thread_block_tile<32> warp = cg::tiled_partition<32>(block);
    sum = cg::reduce(warp, sum, cg::plus<float>());
    if (warp.thread_rank() == 0) parts[warp.meta_group_rank()] = sum;
    cg::sync(block);
    sum = warp.thread_rank() < warp.meta_group_size() ? parts[warp.thread_rank()] : 0.0f;
    float scale = rsqrtf(cg::reduce(warp, sum, cg::plus<float>()) / cols + eps);
    if (block.group_index().x != blockIdx.x || block.dim_threads().x != blockDim.x) scale = 0;
"""
MACRO = "#define GO(kernel, blocks, threads, ...) kernel<<<blocks, threads>>>(__VA_ARGS__)"
VOID_POINTER = (
    "void *kernel = (void *)k; void *args[] = {&input, &weight, &output, &cols, &epsilon};"
    " cudaLaunchKernel(kernel, dim3(rows), dim3(64), args, 0, 0);"
)


def matrix(combine: str = ATOMIC, launch: str = LAUNCH, before: str = "") -> str:
    return ROW.format(before=before, combine=combine, launch=launch)


def graded(tmp_path: Path, text: str, lab_name: str = "rms_norm/matrix", **more):
    source = tmp_path / get(lab_name).source
    source.write_text(text)
    return grade(get(lab_name), source, Options(quick=True, **(OFFLINE | more)))


@needs_compiler
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(matrix(), id="atomic"),
        pytest.param(matrix(ATOMIC.replace("rsqrtf(", "__frsqrt_rn(")), id="rounded intrinsic"),
        pytest.param(matrix(TILES, before=COOPERATIVE), id="groups"),
        pytest.param(matrix("volatile " + ATOMIC.replace("(&all", "((float *)&all")), id="volatile shared"),
        pytest.param(matrix(ATOMIC + " scale = abs(-scale); if (isnan(scale)) scale = 0;"), id="abs of a float"),
        pytest.param(matrix(before='#include "device_launch_parameters.h"'), id="a header of the toolkit"),
        pytest.param(matrix(before=MACRO, launch="GO(k, rows, 64, input, weight, output, cols, epsilon);"), id="macro"),
        pytest.param(
            matrix(launch=f"auto f = k; {LAUNCH.replace('k<<<rows, 64', 'f<<<dim3(rows), 96, 0, 0')}"), id="f"
        ),
    ],
)
def test_unusual_code_is_correct(tmp_path, text):
    report = graded(tmp_path, text)
    assert report.outcome is Outcome.CORRECT, report.lesson


@needs_compiler
@pytest.mark.parametrize(
    "text, construct",
    [
        (matrix(launch=VOID_POINTER), "cudaLaunchKernel with a kernel that is not called by its name"),
        (matrix("cg::thread_group g = cg::this_thread_block(); float scale = 1;", before=COOPERATIVE), "thread_group"),
        (matrix("cg::this_thread_block().barrier_arrive(); float scale = 1;", before=COOPERATIVE), "barrier_arrive"),
        (matrix("float scale = __fmaf_ieee_rn(sum, 1, eps);"), "__fmaf_ieee_rn"),
        (matrix(before="#include <curand.h>"), "curand.h"),
        (matrix(before='#include "cuda_pipeline_primitives.h"'), "cuda_pipeline_primitives.h"),
    ],
)
def test_unusual_code_is_blocked_at_worst(tmp_path, text, construct):
    report = graded(tmp_path, text)
    assert report.outcome is Outcome.BLOCKED and construct in report.lesson.text, report.lesson


@needs_compiler
@pytest.mark.parametrize(
    "text, said",
    [
        (
            matrix("__shared__ float all = 0;\n float scale = all;"),
            "rms_norm_matrix.cu:8: error: a __shared__ variable",
        ),
        (matrix("__shared__ float all[blockDim.x]; float scale = all[0];"), "must be known to the compiler"),
        (matrix("float scale = __shfl_down(sum, 1);"), "write __shfl_down_sync"),
        (matrix("float scale = sum __syncthreads();"), "before a __syncthreads()"),
        (matrix(launch="k<<rows, 64>>(input, weight, output, cols, epsilon);"), "three angle brackets"),
        (matrix(before='#include "helpers.h"'), "helpers.h"),
        (matrix(before="int main() { return 0; }"), "defines `main`"),
        (matrix("float scale = rsqrtff(sum);"), "rsqrtff"),
    ],
)
def test_what_is_no_cuda_does_not_compile(tmp_path, text, said):
    report = graded(tmp_path, text)
    assert report.outcome is Outcome.DOES_NOT_COMPILE and said in report.lesson.text, report.lesson


SQUARE = "{qualifier}float square(float v) {{ return v * v; }}"
SQUARED = ATOMIC.replace("all / cols", "square(sqrtf(all)) / cols")
PLAIN = matrix().replace("__global__ ", "")


@needs_compiler
@pytest.mark.parametrize(
    "text, said",
    [
        (PLAIN, "rms_norm_matrix.cu:4: error: `k` is launched, so it is __global__ void k(...)"),
        (PLAIN.replace("void k(", "template <int N>\nvoid k(").replace("k<<<", "k<1><<<"), "`k` is launched"),
        (matrix().replace("__global__ void", "__global__ int").replace("* w[c];\n", "* w[c]; return 0;\n"), "nothing"),
        (matrix(SQUARED, before=SQUARE.format(qualifier="inline ")), "`square` is called in a kernel, so it is __dev"),
    ],
)
def test_what_only_nvcc_would_refuse_is_found_without_it(tmp_path, text, said):
    report = graded(tmp_path, text)
    assert report.outcome is Outcome.DOES_NOT_COMPILE and said in report.lesson.text, report.lesson


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("void k(", "#define KERNEL __global__ void\nKERNEL k("),
        PLAIN.replace("void k(", "__global__ void k(const float *, const float *, float *, int, float);\nvoid k("),
        matrix().replace("__global__ void", "__global__ void __launch_bounds__(64)"),
        *(
            matrix(SQUARED, before=SQUARE.format(qualifier=qualifier))
            for qualifier in (
                "__device__ ",
                "static __host__ __device__ inline ",
                "constexpr ",
                "template <int> __device__ ",
            )
        ),
        matrix("auto square = [](float v) { return v * v; };" + SQUARED, before=SQUARE.format(qualifier="")),
        matrix(before="struct Sum { float s; Sum(float v) : s(v) {} float square() { return s * s; } };"),
        "float g(float v) { return v; }\ntemplate <class G> __global__ void k(float *x, G g) { x[0] = g(x[0]); }\n",
    ],
)
def test_qualifiers_that_may_be_there_are_not_missed(text):
    assert missing_qualifier(text) is None


# All blocks of a cooperative launch are resident, so one may wait for the others in a loop.
SPIN = """#include "rms_norm_vector.h"
#include <cuda_runtime.h>
__device__ float total;
__device__ int arrived;
__global__ void k(const float *x, const float *w, float *y, int cols, float eps) {
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < cols; i += gridDim.x * blockDim.x) sum += x[i] * x[i];
    atomicAdd(&total, sum);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&arrived, 1);
        while (*(volatile int *)&arrived < gridDim.x) {
        }
    }
    __syncthreads();
    float scale = rsqrtf(*(volatile float *)&total / cols + eps);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < cols; i += gridDim.x * blockDim.x)
        y[i] = x[i] * scale * w[i];
}
void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon) {
    float zero = 0;
    int none = 0;
    cudaMemcpyToSymbol(total, &zero, sizeof zero);
    cudaMemcpyToSymbol(arrived, &none, sizeof none);
    void *arguments[] = {&input, &weight, &output, &cols, &epsilon};
    cudaLaunchCooperativeKernel((void *)k, 4, 32, arguments);
}
"""


@needs_compiler
def test_a_barrier_of_ones_own_is_blocked_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr("common.grading.run.CASE_LIMIT_S", 1)
    source = tmp_path / "rms_norm_vector.cu"
    source.write_text(SPIN)
    report = grade(get("rms_norm/vector"), source, Options(cases=("cols=33",), **OFFLINE))
    assert report.outcome is Outcome.BLOCKED and "loop of their own" in report.lesson.text, report.lesson


@needs_compiler
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(matrix().replace("float sum = 0;", "float sum;"), id="sum"),
        pytest.param(
            matrix(ATOMIC.replace("float scale =", "float scale; if (threadIdx.x == 0) scale =")),
            id="scale of thread 0",
        ),
    ],
)
def test_a_variable_that_nobody_set_is_named_and_no_race(tmp_path, text):
    if not build._locals_hold(build.compiler(), "zero"):
        pytest.skip("a compiler without the flag")
    report = graded(tmp_path, text)
    assert (report.outcome, report.lesson.id) == (Outcome.WRONG, "local-not-set"), report.lesson


@needs_compiler
def test_a_pointer_that_a_failed_call_left_unset_is_named(tmp_path):
    if not build._locals_hold(build.compiler(), "pattern"):
        pytest.skip("a compiler without the flag")
    failing = "float *out; cudaHostGetDevicePointer(&out, output, 0); " + LAUNCH.replace("output", "out")
    report = graded(tmp_path, matrix(launch=failing))
    assert (report.outcome, report.lesson.id) == (Outcome.CRASHES, "local-not-set"), report.lesson
    assert "failed call" in report.lesson.text


def test_rounding_of_a_wrong_sum_is_no_race():
    """Where 0 is expected the tolerance is nearly 0: two orders of a wrong sum differ by more."""
    lab = get("rms_norm/matrix")
    case = next(case for case in lab.cases if case.values == "zeros")
    got = np.full(case.sizes["rows"] * case.sizes["cols"], 0.98, np.float32)
    orders = {FIRST: CaseRun(output=got, ran=True)}
    orders[SCHEDULES[2]] = CaseRun(output=np.nextafter(got, np.float32(1)), ran=True)
    assert races(evaluate(lab, case, inputs_of(lab, case), orders)) is None
    orders[SCHEDULES[2]] = CaseRun(output=got * np.float32(1.001), ran=True)
    assert races(evaluate(lab, case, inputs_of(lab, case), orders)) == "ascending and descending"


@needs_compiler
@pytest.mark.parametrize("nvcc_says, outcome", [(0, Outcome.BLOCKED), (1, Outcome.DOES_NOT_COMPILE)])
@pytest.mark.parametrize("text", [matrix("float scale = not_known(sum);"), matrix("float scale = 1; asm(1);")])
def test_where_nvcc_is_installed_it_decides_what_is_cuda(tmp_path, monkeypatch, text, nvcc_says, outcome):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'rms_norm_matrix.cu(7): error: no' >&2\nexit {nvcc_says}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "nvcc", lambda: str(nvcc))
    assert graded(tmp_path, text, nvcc=True).outcome is outcome


@needs_compiler
def test_the_compiler_has_a_limit_of_memory(tmp_path):
    report = graded(tmp_path, '#include "/dev/zero"\n')
    assert report.outcome is Outcome.DOES_NOT_COMPILE and "memory" in report.lesson.text


def test_reset_keeps_no_copy_of_the_stub(tmp_path, monkeypatch, capsys):
    from common.grading import cli, lab

    monkeypatch.setattr(lab, "ROOT", tmp_path)
    theirs, stub = (tmp_path / folder / "silu/CUDA" for folder in ("", "common/grading/stubs"))
    for folder in (theirs, stub):
        folder.mkdir(parents=True)
        (folder / "silu.cu").write_text("stub")
    cli.reset(get("silu/CUDA"))
    assert [path.name for path in theirs.iterdir()] == ["silu.cu"] and "already" in capsys.readouterr().out
    (theirs / "silu.cu").write_text("mine")
    cli.reset(get("silu/CUDA"))
    assert (theirs / "silu.cu.bak").read_text() == "mine" and (theirs / "silu.cu").read_text() == "stub"


def test_a_file_that_may_not_be_touched_is_bad_input(monkeypatch, capsys):
    from common.grading import cli

    def refused(lab):
        raise PermissionError(13, "Permission denied", "silu.cu")

    monkeypatch.setattr(cli, "reset", refused)
    with pytest.raises(SystemExit) as ended:
        cli.main("silu/CUDA", ["--reset"])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: silu.cu: Permission denied\n"


SILU = """import torch
import triton
import triton.language as tl
{before}
@triton.jit
def kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = {load}.to(tl.float32)
    tl.store(y + at, v * {sigmoid}, mask=at < n)

def silu_triton(input):
    x = input.contiguous()
    y, n = torch.empty_like(x), x.numel()
    kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n{block})
    return y
"""
LOAD = "tl.load(x + at, mask=at < n)"
BLOCK_POINTER = (
    "tl.load(tl.make_block_ptr(x, (n,), (1,), (tl.program_id(0) * BLOCK,), (BLOCK,), (0,)), boundary_check=(0,))"
)
AUTOTUNE = "@triton.autotune([triton.Config({'BLOCK': 512}), triton.Config({'BLOCK': 1024})], key=['n'])"


def triton_file(before: str = "", load: str = LOAD, sigmoid: str = "tl.sigmoid(v)", block: str = ", BLOCK=512") -> str:
    return SILU.format(before=before, load=load, sigmoid=sigmoid, block=block)


@needs_triton
@pytest.mark.parametrize(
    "text, outcome, said",
    [
        pytest.param(triton_file(before=AUTOTUNE, block=""), Outcome.CORRECT, "", id="autotune"),
        pytest.param(triton_file(load=BLOCK_POINTER), Outcome.CORRECT, "", id="block pointer"),
        pytest.param(
            triton_file("from triton.language.extra import libdevice", sigmoid="(0.5 + 0.5 * libdevice.tanh(v / 2))"),
            Outcome.BLOCKED,
            "libdevice.tanh",
            id="libdevice",
        ),
    ],
)
def test_unusual_triton(tmp_path, text, outcome, said):
    source = tmp_path / "silu_triton_kernel.py"
    source.write_text(text)
    report = grade(get("silu"), source, Options(cases=("n=33", "n=1025"), quick=True, **OFFLINE))
    assert report.outcome is outcome, report.lesson
    assert not said or said in report.lesson.text


@needs_compiler
def test_silu_through_tanh_is_silu(tmp_path):
    """0.5 x (1 + tanh(x / 2)) cancels for negative x, within a rounding error of x."""
    text = """#include "silu.h"
__global__ void k(const float *x, float *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 0.5f * x[i] * (1.0f + tanhf(0.5f * x[i]));
}
void silu(float *input, float *output, int n) { k<<<(n + 255) / 256, 256>>>(input, output, n); }
"""
    report = graded(tmp_path, text, "silu/CUDA")
    assert report.outcome is Outcome.CORRECT, report.lesson


@pytest.mark.parametrize("lab_name", list(LABS))
def test_untouched_memory_passes_no_case(lab_name):
    """Where the definition gives NaN only NaN is right: what a stub leaves behind earns nothing."""
    lab = get(lab_name)
    for case in lab.cases:
        if case.gpu_only:
            continue
        inputs = inputs_of(lab, case)
        with np.errstate(all="ignore"):
            count = np.asarray(lab.expected(case, inputs)).size
        left = CaseRun(output=np.full(count, 13323083.0, np.float32), ran=True)
        assert not evaluate(lab, case, inputs, {FIRST: left}).passed, case.name
