"""Every stub is `not started`, every solution correct, every wrong file teaches its lesson; texts agree."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab_files import CUDA_LABS, ROOT, all_wrong, anonymous_copy, needs_compiler, needs_triton, stub_path, wrong_files

from common.grading.build import Blocked, build_emulated
from common.grading.grader import Options, grade
from common.grading.lab import LABS, get
from common.grading.outcome import Outcome

HERE = Path(__file__).parent

OFFLINE = {"use_gpu": False, "nvcc": False}


def lab_params() -> list:
    return [pytest.param(name, marks=needs_triton if name == "silu" else needs_compiler) for name in LABS]


def solution_params() -> list:
    found = []
    for name in LABS:
        steps = get(name).solutions()
        for step in steps:
            marks = [needs_triton, pytest.mark.slow] if name == "silu" and step != steps[-1] else []
            found.append(pytest.param(name, step, id=f"{name}/{step.stem}", marks=marks or needs_compiler))
    return found


@pytest.mark.parametrize("lab_name", lab_params())
def test_stub_is_not_started(lab_name):
    report = grade(get(lab_name), stub_path(lab_name), Options(quick=True, **OFFLINE))
    assert report.outcome is Outcome.NOT_STARTED and report.outcome.exit_code == 3
    assert report.earned == 0


@pytest.mark.parametrize("lab_name, step", solution_params())
def test_solution_is_correct(lab_name, step):
    report = grade(get(lab_name), step, Options(quick=lab_name == "silu", **OFFLINE))
    assert report.outcome is Outcome.CORRECT, report.lesson
    assert report.earned == report.possible == 80


def vector_params() -> list:
    """(lab, step that uses float4, a pointer of its function)."""
    found = []
    for name in CUDA_LABS:
        for step in get(name).solutions():
            if "float4" in step.read_text():
                found += [
                    pytest.param(name, step, pointer, id=f"{name}/{step.stem}/{pointer}")
                    for pointer in re.findall(r"float \*(\w+)", get(name).signature)
                ]
    return found


def with_one_pointer_moved(lab, step: Path, moved: str) -> str:
    """The step behind a function that hands it copies, of which one starts 4 bytes after a multiple of 16."""
    pointers = re.findall(r"float \*(\w+)", lab.signature)
    sizes = re.findall(r"int (\w+)", lab.signature)
    length = {name: sizes[-1] if name == "weight" else " * ".join(sizes) for name in pointers}
    lines = [step.read_text().replace(f"void {lab.function}(float", "void solution(float"), lab.signature + " {"]
    for name in pointers:
        lines += [
            f"    float *memory_{name};",
            f"    cudaMalloc(&memory_{name}, ({length[name]} + 1) * sizeof(float));",
            f"    float *my_{name} = memory_{name} + {int(name == moved)};",
        ]
        if name != "output":
            lines += [f"    cudaMemcpy(my_{name}, {name}, {length[name]} * sizeof(float), cudaMemcpyDeviceToDevice);"]
    arguments = [*(f"my_{name}" for name in pointers), *sizes, *re.findall(r"float (\w+)", lab.signature)]
    lines += [
        f"    solution({', '.join(arguments)});",
        f"    cudaMemcpy(output, my_output, {length['output']} * sizeof(float), cudaMemcpyDeviceToDevice);",
        *(f"    cudaFree(memory_{name});" for name in pointers),
        "}",
    ]
    return "\n".join(lines) + "\n"


@needs_compiler
@pytest.mark.parametrize("lab_name, step, moved", vector_params())
def test_vector_solution_takes_addresses_that_are_no_multiple_of_16(tmp_path, lab_name, step, moved):
    """A slice of a tensor may start at any float; the grader's own buffers start at a multiple of 16."""
    lab = get(lab_name)
    (tmp_path / lab.source).write_text(with_one_pointer_moved(lab, step, moved))
    report = grade(lab, tmp_path / lab.source, Options(quick=True, **OFFLINE))
    assert report.outcome is Outcome.CORRECT, (report.lesson, report.cases)


@pytest.mark.parametrize("lab_name, name, want", all_wrong())
def test_wrong_file_teaches_its_lesson(lab_name, name, want):
    source = HERE / "wrong" / lab_name / (name + Path(get(lab_name).source).suffix)
    options = Options(cases=tuple(want["cases"]), quick=True, **OFFLINE)
    report = grade(get(lab_name), anonymous_copy(source), options)
    assert (report.outcome.value, report.lesson.id) == (want["outcome"], want["lesson"]), report.lesson
    assert report.outcome.exit_code == 1
    assert not report.cases[0].passed and report.cases[0].detail


@pytest.mark.parametrize("lab_name", list(LABS))
def test_enough_wrong_files_and_none_without_a_lesson(lab_name):
    folder, wanted = HERE / "wrong" / lab_name, wrong_files(lab_name)
    suffix = Path(get(lab_name).source).suffix
    assert {p.stem for p in folder.glob(f"*{suffix}")} == set(wanted)
    assert len(wanted) >= (5 if lab_name == "silu" else 10)


@pytest.mark.parametrize("lab_name", list(LABS))
def test_points_are_eighty_and_twenty(lab_name):
    correctness, speed = get(lab_name).points()
    assert sum(correctness.values()) == 80 and speed["points"] == 20
    assert len({case.name for case in get(lab_name).cases}) == len(get(lab_name).cases)


@pytest.mark.parametrize("lab_name", CUDA_LABS)
def test_signatures_agree(lab_name):
    lab = get(lab_name)
    spaceless = lambda text: re.sub(r"\s+", "", text)  # noqa: E731
    sources = [stub_path(lab_name), lab.folder / "README.md", *lab.solutions(), *lab.folder.glob("*.h")]
    for path in sources:
        assert spaceless(lab.signature) in spaceless(path.read_text()), f"{path} lacks `{lab.signature}`"


@pytest.mark.parametrize("lab_name", list(LABS))
def test_three_solutions_with_prediction_and_measurement(lab_name):
    steps = get(lab_name).solutions()
    assert len(steps) >= 3
    for step in steps:
        head = step.read_text()[:2500]
        assert "Predicted:" in head and "Measured:" in head, step


@pytest.mark.parametrize("lab_name", list(LABS))
def test_help_is_quick_to_import(lab_name):
    code = (
        f"import sys; sys.argv = ['grade.py', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
        "from common.grading.cli import main\n"
        f"try:\n    main({lab_name!r})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'triton', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@needs_compiler
def test_commands_of_a_grade_script(tmp_path):
    """A bad case name is one line and exit code 2; results.json has Gradescope's fields."""
    script = ROOT / "silu/CUDA/grade.py"
    student = tmp_path / "student"
    student.mkdir()
    shutil.copy(get("silu/CUDA").solutions()[0], student / "silu.cu")
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        str(script),
        "--submission",
        str(student),
        "--quick",
        "--no-gpu",
        "--gradescope",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["score"] == pytest.approx(sum(t["max_score"] for t in result["tests"]), abs=0.01)
    assert {"name", "score", "max_score", "output", "visibility"} == set(result["tests"][0])
    assert result["score"] > 50
    bad = subprocess.run([sys.executable, str(script), "--case", "nothing"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "nothing" in bad.stderr


@pytest.mark.parametrize(
    "options, named",
    [
        (["--solution", "9"], "9"),
        (["--submission", "nowhere"], "nowhere"),
        (["--json", "no/such/folder/x.json", "--submission", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(options, named):
    command = [sys.executable, str(ROOT / "host_GPU/grade.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr


@needs_triton
def test_memory_is_limited_where_no_address_space_limit_is(tmp_path, monkeypatch):
    """Triton's interpreter and AddressSanitizer reserve more than they use, so it is use that counts."""
    source = tmp_path / "silu_triton_kernel.py"
    source.write_text(
        "import time\nimport torch\n\ndef silu_triton(input):\n    kept = torch.ones(400_000_000)\n    time.sleep(5)\n"
        "    return input * torch.sigmoid(input) + 0 * kept[0]\n"
    )
    monkeypatch.setattr("common.grading.run.MEMORY_LIMIT_MB", 1200)
    report = grade(get("silu"), source, Options(cases=("n=33",), quick=True, **OFFLINE))
    assert report.outcome is Outcome.CRASHES and report.lesson.id == "out-of-memory", report.lesson
    assert "1200 MB" in report.cases[0].detail


@needs_compiler
def test_a_part_of_the_cases_does_not_claim_a_full_total(tmp_path):
    step = get("silu/CUDA").solutions()[0]
    quick = grade(get("silu/CUDA"), step, Options(quick=True, **OFFLINE))
    assert quick.possible == 70 and "left out" in quick.notes[-1]


def test_each_case_option_counts():
    """`--case n=33 --case wide`: the case called n=33 and not n=333, and beside it those that contain `wide`."""
    from common.errors import UserError
    from common.grading.grader import choose_cases

    lab = get("silu/CUDA")
    chosen = choose_cases(lab, Options(cases=("wide", "n=1")))
    assert [case.name for case in chosen] == ["n=1", "n=999,wide"]
    with pytest.raises(UserError, match="n=100000007: that case needs a GPU"):
        choose_cases(lab, Options(cases=("n=1", "n=100000007")))


def test_hidden_cases_are_hidden_in_gradescope_only():
    from common.grading.outcome import CaseResult, Report
    from common.grading.scorecard import gradescope

    cases = [CaseResult("n=1", "shapes", True), CaseResult("n=2", "shapes", False, hidden=True, detail="wrong")]
    report = Report("silu/CUDA", "silu.cu", Outcome.WRONG, cases=cases, points={"shapes": (20.0, 40.0)})
    tests = gradescope(report)["tests"]
    assert [t["visibility"] for t in tests] == ["visible", "hidden"] and [t["score"] for t in tests] == [20.0, 0.0]
    assert report.as_dict()["cases"][1]["detail"] == "wrong"


@needs_compiler
@pytest.mark.parametrize(
    "body, construct",
    [
        ('asm volatile("nop;");', "asm"),
        ("cudaGraph_t graph;", "cudaGraph_t"),
        ("unsigned r = __reduce_add_sync(0xffffffff, n);", "__reduce_add_sync"),
        ("cudaArray_t array;", "cudaArray_t"),
    ],
)
def test_what_the_emulation_lacks_is_blocked_not_wrong(tmp_path, body, construct):
    source = tmp_path / "silu.cu"
    source.write_text(f'#include "silu.h"\nvoid silu(float *input, float *output, int n) {{\n    {body}\n}}\n')
    with pytest.raises(Blocked, match=construct):
        build_emulated(get("silu/CUDA"), source, tmp_path)
    report = grade(get("silu/CUDA"), source, Options(quick=True, **OFFLINE))
    assert report.outcome is Outcome.BLOCKED and report.outcome.exit_code == 4


@needs_compiler
def test_compile_error_names_the_learners_line(tmp_path):
    source = tmp_path / "silu.cu"
    source.write_text('#include "silu.h"\n\nvoid silu(float *input, float *output, int n) {\n    int x = y;\n}\n')
    report = grade(get("silu/CUDA"), source, Options(quick=True, **OFFLINE))
    assert report.outcome is Outcome.DOES_NOT_COMPILE
    assert "silu.cu:4" in report.lesson.text and "y" in report.lesson.text


@needs_compiler
def test_another_signature_is_named(tmp_path):
    source = tmp_path / "silu.cu"
    source.write_text("void silu(float *input, float *output, long n) {}\n")
    report = grade(get("silu/CUDA"), source, Options(quick=True, **OFFLINE))
    assert report.outcome is Outcome.DOES_NOT_COMPILE and "int n" in report.lesson.text


@needs_compiler
def test_a_crash_and_an_early_exit_are_outcomes(tmp_path):
    for body in ("*(volatile int *)0 = 1;", "exit(0);", "abort();"):
        source = tmp_path / "silu.cu"
        source.write_text(f"#include <cstdlib>\nvoid silu(float *input, float *output, int n) {{ {body} }}\n")
        report = grade(get("silu/CUDA"), source, Options(cases=("n=33",), quick=True, **OFFLINE))
        assert report.outcome is Outcome.CRASHES, body


@pytest.mark.parametrize("lab_name", list(LABS))
def test_commands_in_the_handout_are_accepted(lab_name):
    """Every grade.py line of the handout parses, and names this lab's script and a case that exists."""
    from common.grading.cli import parser
    from common.grading.grader import choose_cases

    text = (get(lab_name).folder / "README.md").read_text()
    lines = [
        line.split("#")[0].split() for line in text.splitlines() if line.startswith("python ") and "grade.py" in line
    ]
    assert len(lines) >= 5
    for _, script, *options in lines:
        assert script == f"{lab_name}/grade.py" and (ROOT / script).is_file()
        args = parser(lab_name).parse_args(options)
        if args.case:
            assert choose_cases(get(lab_name), Options(cases=tuple(args.case)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("cmake") is None, reason="needs nvcc and CMake")
@pytest.mark.parametrize("lab_name", CUDA_LABS)
def test_main_builds_with_cmake_and_nvcc(lab_name, tmp_path):
    folder = get(lab_name).folder
    configure = ["cmake", "-S", str(folder), "-B", str(tmp_path), "-DCMAKE_CUDA_ARCHITECTURES=90"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
