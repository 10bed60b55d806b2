"""The source-to-source step: what it changes, and that lines stay where they are."""

import pytest

from common.grading.rewrite import blank_comments, find_lacking, rewrite


def body(source: str) -> str:
    return rewrite(source, "x.cu").split("\n", 1)[1]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("k<<<1, 2>>>(a, b);", "emu::Launch(1, 2).call([=](auto... emu_a) { k(emu_a...); }, a, b);"),
        (
            "k<4, float><<<g, b, 8>>>(f(a));",
            "emu::Launch(g, b, 8).call([=](auto... emu_a) { k<4, float>(emu_a...); }, f(a));",
        ),
        ("n::k<<<1, 2>>>();", "emu::Launch(1, 2).call([=](auto... emu_a) { n::k(emu_a...); });"),
        ("// k<<<1, 2>>>(a);", "// k<<<1, 2>>>(a);"),
        ('puts("k<<<1, 2>>>(a)");', 'puts("k<<<1, 2>>>(a)");'),
        ("int a = b << 3 >> 1;", "int a = b << 3 >> 1;"),
    ],
)
def test_launches(source, expected):
    assert body(source) == expected


def test_shared_declarations_of_each_kind():
    text = body("void k() { __shared__ float s[32], t; extern __shared__ int d[]; }")
    assert "auto &s = emu::block_shared<float [32]>" in text and "auto &t = emu::block_shared<float >" in text
    assert "int *d = emu::dynamic_shared<int>();" in text


def test_lines_stay():
    source = "/* a\nb */\nk<<<\n1,\n2>>>(\na);\nvoid f() {\n__shared__ float\ns[2];\n}\nend\n"
    assert body(source).count("\n") == source.count("\n")
    assert body(source).split("\n")[10] == "end"


def test_lacking_construct_is_found_with_its_line_but_not_in_a_comment():
    assert find_lacking("// asm(\nint a;\n") is None
    found = find_lacking('int a;\n  asm("x");\n')
    assert (found.construct, found.line) == ("inline PTX (asm)", 2)
    assert find_lacking("#include <cub/cub.cuh>\n").construct == "cub/cub.cuh"


def test_blanking_keeps_length():
    source = 'a // b\n"c\\"d" /* e\nf */ \'g\''
    assert len(blank_comments(source)) == len(source)
