"""Grades silu.cu, with or without a GPU.

python silu/CUDA/grade.py
python silu/CUDA/grade.py --quick --hint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.grading.cli import main

if __name__ == "__main__":
    main("silu/CUDA")
