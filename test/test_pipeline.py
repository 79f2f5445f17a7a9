"""How many steps are in flight."""

from physai_decode.engines.native.graph import AHEAD
from physai_decode.engines.native.graph import CALM_STEPS
from physai_decode.engines.native.graph import Depth
from physai_decode.engines.native.graph import MOST_AHEAD
import pytest


def test_it_follows_the_host():
    """A late step is one more in flight, many that are not late are one less."""
    depth = Depth()
    assert depth.steps == AHEAD and depth.most == MOST_AHEAD
    depth.learn(late=True)
    assert depth.steps == AHEAD + 1
    for _ in range(CALM_STEPS - 1):
        depth.learn(late=False)
    assert depth.steps == AHEAD + 1
    depth.learn(late=False)
    assert depth.steps == AHEAD


def test_it_has_bounds():
    """From two to eight."""
    depth = Depth()
    for _ in range(2 * MOST_AHEAD):
        depth.learn(late=True)
    assert depth.steps == MOST_AHEAD
    for _ in range(MOST_AHEAD * CALM_STEPS):
        depth.learn(late=False)
    assert depth.steps == AHEAD


@pytest.mark.parametrize('fixed', [1, 2, 5])
def test_a_number_that_was_set_stays(fixed):
    depth = Depth(fixed)
    for late in [True] * MOST_AHEAD + [False] * CALM_STEPS:
        depth.learn(late)
        assert depth.steps == depth.most == fixed
