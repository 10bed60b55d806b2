import bisect
import random

import pytest

from common.attention_bench import plots
from common.attention_bench.options import BACKENDS
from common.roofline import Ceilings

NAMES = list(BACKENDS)


def test_every_backend_has_a_style_of_its_own():
    assert tuple(plots.STYLES) == BACKENDS and len(set(plots.STYLES.values())) == len(BACKENDS)


def test_no_backend_hides_another_and_none_reaches_the_next_intensity():
    rng = random.Random(0)
    for _ in range(50):
        intensities = [4.0 * 2 ** (i * rng.uniform(0.5, 3)) for i in range(rng.randint(1, 5))]
        points = [(x * rng.uniform(1, 1.01), name) for x in intensities for name in rng.sample(NAMES, 7)]
        grouped = plots.groups(points)
        places = [group.place(name) for group in grouped for name in group.backends]
        assert places == sorted(set(places))
        assert {name for _, name in points} == {name for group in grouped for name in group.backends}
        for before, after in zip(grouped, grouped[1:]):
            assert before.flop_per_byte < before.span()[1] < after.span()[0] < after.flop_per_byte


def test_one_intensity_takes_two_octaves_around_it():
    (group,) = plots.groups([(3.98, NAMES[3]), (4.0, NAMES[1]), (4.0, NAMES[0])])
    assert group.backends == [NAMES[0], NAMES[1], NAMES[3]] and group.span() == pytest.approx((1.99, 7.96))
    assert group.place(NAMES[1]) == pytest.approx(3.98)


@pytest.mark.parametrize("intensities", [[4, 400, 800], [400, 800], [2, 4], [90, 110, 230], [95]])
def test_the_roof_over_a_point_is_that_of_its_own_intensity(intensities):
    known = Ceilings("a GPU", "cuda", 4000.0, 5000.0, 1 << 20, {"bfloat16": {"burst": 500.0, "sustained": 400.0}})
    grouped = plots.groups([(x, name) for x in intensities for name in NAMES])
    xs, ys = plots.roof(known, "bfloat16", grouped)
    for x, y in zip(xs, ys):
        if not any(group.span()[0] <= x <= group.span()[1] for group in grouped):
            assert y == pytest.approx(min(500.0, x * 5.0))
    for group, own in zip(grouped, intensities):
        for name in NAMES:
            at = bisect.bisect(xs, group.place(name))
            assert ys[at - 1] == ys[at] == pytest.approx(min(500.0, own * 5.0))
