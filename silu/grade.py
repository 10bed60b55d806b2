"""Grades silu_triton_kernel.py; without a GPU, under Triton's interpreter.

python silu/grade.py
python silu/grade.py --quick --hint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.grading.cli import main

if __name__ == "__main__":
    main("silu", after="The same function in CUDA: python silu/CUDA/grade.py")
