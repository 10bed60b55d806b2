"""What the pipeline's sweeps say of their rows.

Catches: rows that --resume appended behind larger ones, taken for the largest.
"""

from pathlib import Path
from types import SimpleNamespace

from common.scripts.pipeline_sweeps import conclusion


def test_the_sentence_is_about_the_largest_batch_wherever_its_row_stands():
    sizes = {"prompt_tokens": 8, "output_tokens": 8}
    rows = [{"batch_size": n, "tokens_per_s": 10.0 * n} | sizes for n in (2, 8, 1, 4)]
    text = conclusion(None, [SimpleNamespace(path=Path("pipeline_batch.csv"), rows=rows)])
    assert text == "8 requests at once gave 8 times the tokens/s of 1."
