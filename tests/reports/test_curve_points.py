from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from noether.reports.html.curves import average_parts, choose_levels, choose_points

VALUES = arrays.arrays(np.float64, st.integers(1, 400), elements=st.floats(width=64))


@given(VALUES, st.integers(5, 60))
def test_the_curve_keeps_its_ends_its_extremes_and_its_gaps(values, limit):
    chosen = choose_points(values, limit)
    assert len(chosen) <= max(limit, 0)
    assert (np.diff(chosen) > 0).all()
    assert {chosen[0], chosen[-1]} == {0, len(values) - 1}
    finite = values[np.isfinite(values)]
    if len(finite):
        assert {finite.min(), finite.max()} <= set(values[chosen][np.isfinite(values[chosen])])
    assert np.isfinite(values).all() == np.isfinite(values[chosen]).all()


@given(VALUES)
def test_a_short_curve_stays_whole(values):
    assert (choose_points(values, len(values) + 4) == np.arange(len(values))).all()


def test_every_spike_of_one_step_stays():
    generator = np.random.default_rng(0)
    values = generator.normal(size=1_000_000)
    spikes = np.arange(0, 1_000_000, 5000) + generator.integers(0, 3900, 200)  # at most one in each bucket
    values[spikes] += 100.0
    assert set(spikes) <= set(choose_points(values, 2000))


@given(VALUES, st.integers(5, 20), st.integers(5, 200))
def test_levels_get_finer_and_the_last_is_the_finest(values, overview, finest):
    levels = choose_levels(values, overview, finest)
    sizes = [len(level) for level in levels]
    assert sizes == sorted(sizes)
    assert 1 <= len(levels) <= 3
    if len(values) <= max(overview, finest):
        assert sizes[-1] == len(values)


def test_a_limit_without_room_for_a_bucket_is_refused():
    with pytest.raises(ValueError, match="at least 5"):
        choose_points(np.zeros(10), 4)


@given(VALUES, st.integers(1, 20))
def test_averages_of_parts_are_those_of_their_finite_values(values, limit):
    ends, averages = average_parts(values, limit)
    assert len(ends) == len(averages) <= limit
    starts = [0, *(ends[:-1] + 1)]
    for start, end, average in zip(starts, ends, averages, strict=True):
        part = values[start : end + 1]
        finite = part[np.isfinite(part)]
        assert np.isnan(average) == (len(finite) == 0)
        if len(finite):
            exact = float(sum(map(Fraction, finite.tolist())) / len(finite))
            assert abs(average / 2 - exact / 2) <= 1e-12 * np.abs(finite).max() + 1e-320  # halves do not overflow
    if len(values):
        assert ends[-1] == len(values) - 1
