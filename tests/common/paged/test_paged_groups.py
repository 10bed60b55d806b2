from random import Random

import pytest

from common.paged.groups import group_by_length


def test_rows_of_about_one_length_go_together():
    assert group_by_length([], 8, 100) == []
    assert group_by_length([5, 9, 6, 1, 9], 0, 100) == [[1, 4], [2], [0], [3]]  # nothing is padded
    assert group_by_length([5, 9, 6, 1, 9], 3, 100) == [[1, 4, 2], [0], [3]]
    assert group_by_length([5, 9, 6, 1, 9], 8, 27) == [[1, 4, 2], [0, 3]]  # three rows of nine, no more
    assert group_by_length([5, 9], 8, 1) == [[1], [0]]  # a row longer than a group goes alone


@pytest.mark.parametrize("seed", range(50))
def test_every_row_once_within_both_limits(seed):
    draw = Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 40))]
    most_padding, most_tokens = draw.choice([0, 1, 10, 100]), draw.choice([1, 50, 500])
    groups = group_by_length(lengths, most_padding, most_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded = lengths[group[0]]
        assert all(0 <= padded - lengths[row] <= most_padding for row in group)
        assert len(group) == 1 or len(group) * padded <= most_tokens
