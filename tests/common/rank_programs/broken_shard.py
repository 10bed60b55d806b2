"""Run by test_section2.py under torchrun: a script whose last rank holds its parts of o_proj too large.

Arguments: the factor, the script, the script's own arguments.
"""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common import checkpoint
from common.kernels.linear import Linear

load, factor = checkpoint.load, float(sys.argv[1])


def load_broken(*args, **options):
    model, tokenizer = load(*args, **options)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        layers = tuple(
            dataclasses.replace(w, o_proj=Linear(w.o_proj.weight * factor, group=w.o_proj.group)) for w in model.layers
        )
        model = dataclasses.replace(model, layers=layers)
    return model, tokenizer


checkpoint.load = load_broken
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
