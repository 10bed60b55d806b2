"""What a machine without a Hopper GPU can tell of hopper_gemm: its plans are tiles that exist, and the source compiles.

Catches: a tile in the Python table that the source does not compile (a launch that fails on the GPU alone), a cluster
too large, K cut into parts of nothing, sums that spill out of registers.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.kernels import hopper_gemm
from common.kernels.hopper_gemm import (
    BLOCK_K,
    CLUSTER_SIZES,
    COLUMNS,
    COLUMNS_SILU,
    Plan,
    choose_plan,
    plans_of,
    predicted_us,
)

# 132 multiprocessors in groups of 16 and 18, of which not all can be in a cluster: of the order of an H200's.
H200_CLUSTERS = (132, 66, 42, 31, 20, 14)


def compiled_tiles():
    """(rows of x, rows of W, silu) of each TRY line of the source, checked against the warpgroups it names."""
    tiles = set()
    pattern = r"TRY\((\d+), (\d+), (\d+), (\d+), (\d+), (true|false)\)"
    for found in re.findall(pattern, hopper_gemm.SOURCE.read_text()):
        rows, below, beside, blocks, columns = map(int, found[:5])
        assert rows == 64 * below * blocks
        tiles.add((rows, columns * beside, found[5] == "true"))
    return tiles


def test_the_table_is_what_the_source_compiles():
    planned = {(rows, c, False) for rows, columns in COLUMNS.items() for c in columns}
    planned |= {(rows, c, True) for rows, columns in COLUMNS_SILU.items() for c in columns}
    assert planned == compiled_tiles()
    assert f"BLOCK_K = {BLOCK_K};" in hopper_gemm.SOURCE.with_name("hopper_tile.cuh").read_text()


@given(
    st.integers(1, 256),
    st.integers(1, 20000),
    st.integers(1, 2000),
    st.booleans(),
    st.sampled_from([H200_CLUSTERS, (114, 57, 35, 26, 16, 0)]),
)
def test_every_plan_can_be_launched(rows, outputs, features, silu, clusters):
    outputs, features = 8 * outputs, 8 * features
    plans = plans_of(rows, outputs, features, silu, clusters)
    assert choose_plan(rows, outputs, features, silu, clusters) in plans
    for plan in plans:
        size = plan.sharers * plan.parts
        assert size in CLUSTER_SIZES
        blocks = -(-features // BLOCK_K)
        cuts = [blocks * part // plan.parts for part in range(plan.parts + 1)]
        assert all(a < b for a, b in zip(cuts, cuts[1:])), "a part of K without a block"
        tiles = -(-outputs // (plan.columns // 2 if silu else plan.columns))
        if plan.parts > 1:  # one tile a cluster: they must all be there at once, and none may have a second
            assert -(-tiles // plan.sharers) <= clusters[CLUSTER_SIZES.index(size)] and not silu


def test_the_prediction_knows_what_sharing_saves():
    """256 rows for a wide weight: x from L2 once a block is what limits; shared by two it is half of that."""
    alone, shared = (predicted_us(256, 14336, 4096, True, Plan(112, s, 1), H200_CLUSTERS) for s in (1, 2))
    assert alone > 1.3 * shared
    assert predicted_us(256, 14336, 4096, True, Plan(112, 4, 4), H200_CLUSTERS) == float(
        "inf"
    )  # 16 blocks are no cluster


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_it_compiles_and_keeps_its_sums_in_registers(tmp_path):
    command = ["nvcc", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    command += ["-o", str(tmp_path / "kernel.cubin"), str(hopper_gemm.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) == len(compiled_tiles()) and set(spills) == {"0"}
    assert "C7510" not in done.stderr  # wgmma made to wait for each other
