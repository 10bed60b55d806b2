"""Grades copy_first_column.cu, with or without a GPU.

python host_GPU/grade.py
python host_GPU/grade.py --quick --hint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.grading.cli import main

if __name__ == "__main__":
    main("host_GPU")
