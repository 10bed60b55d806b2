"""Grading a class goes on after any failure; the handout holds no solutions and starts every lab at its stub."""

import csv
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lab_files import needs_compiler

from common.grading import batch, handout
from common.grading.lab import LABS, ROOT, get


@needs_compiler
def test_a_class_is_graded_to_its_end(tmp_path):
    lab = get("silu/CUDA")
    files = {
        "ada": lab.solutions()[0].read_text(),
        "ben": "int main( {",
        "dan": "void silu(float *, float *, int) { while (1); }",
        "eve": "void silu(float *, float *, int) { *(volatile int *)0 = 1; }",
    }
    for student, text in files.items():
        (tmp_path / "class" / student).mkdir(parents=True)
        (tmp_path / "class" / student / "silu.cu").write_text(text)
    (tmp_path / "class" / "cyd").mkdir()
    out = tmp_path / "grades.csv"
    assert batch.main([str(tmp_path / "class"), "--lab", "silu/CUDA", "--no-gpu", "--quick", "--out", str(out)]) == 0
    rows = {row["student"]: row for row in csv.DictReader(out.open())}
    assert {s: r["outcome"] for s, r in rows.items()} == {
        "ada": "correct",
        "ben": "does not compile",
        "cyd": "missing",
        "dan": "crashes",
        "eve": "crashes",
    }
    assert "never ends" in rows["dan"]["lesson"] and {float(rows[s]["earned"]) for s in ("cyd", "eve")} == {0.0}
    assert batch.main([str(tmp_path / "nobody"), "--out", str(out)]) == 2


def test_ctrl_c_keeps_the_rows_of_a_class(tmp_path, monkeypatch, capsys):
    def graded(student, lab, options):
        if student.name == "ben":
            raise KeyboardInterrupt
        return dict.fromkeys(batch.COLUMNS, "") | {"student": student.name}

    monkeypatch.setattr(batch, "grade_one", graded)
    for student in ("ada", "ben"):
        (tmp_path / "class" / student).mkdir(parents=True)
    out = tmp_path / "grades.csv"
    assert batch.main([str(tmp_path / "class"), "--lab", "silu", "--out", str(out)]) == 130
    assert [row["student"] for row in csv.DictReader(out.open())] == ["ada"]
    assert str(out) in capsys.readouterr().err
    assert batch.main([str(tmp_path / "class"), "--out", str(tmp_path / "no" / "g.csv")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'g.csv'}: No such file or directory\n"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the handout is made from a git clone")
def test_handout_has_stubs_and_no_solutions(tmp_path):
    target = tmp_path / "handout.zip"
    handout.write(target)
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        assert not [n for n in names if "/solutions/" in n or "/tests/grading/" in n]
        assert len(names) == len(set(names))
        archive.extractall(tmp_path)
    clone = tmp_path / handout.FOLDER
    links = re.findall(r"\]\(([^)#:]+)\)", (clone / "README.md").read_text())
    assert links and not [link for link in links if not (clone / link).exists()]
    for name in LABS:
        source = clone / name / get(name).source
        assert source.read_bytes() == (ROOT / handout.STUBS / name / get(name).source).read_bytes()
    source.write_text("spoilt")
    done = subprocess.run([sys.executable, str(clone / name / "grade.py"), "--reset"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spoilt" not in source.read_text() and Path(f"{source}.bak").read_text() == "spoilt"
