import io
import math

import matplotlib.image
import numpy as np
from example_runs import write_run

from noether.reports.html.picture import draw_picture


def count_colors(picture):
    """Return how many pixels of a picture have the colors of the first and of the second run."""
    pixels = matplotlib.image.imread(io.BytesIO(picture))[..., :3]
    return [(np.abs(pixels - color).max(axis=-1) < 0.02).sum() for color in ((0.0, 0.447, 0.698), (0.835, 0.369, 0.0))]


def test_all_runs_are_drawn(tmp_path):
    runs = [
        write_run(tmp_path / name, [{"loss": 1.0}, {"loss": math.nan}, {"loss": level}])
        for name, level in (("first", 0.5), ("second", 0.25))
    ]
    picture, left_out = draw_picture(runs)
    assert left_out == 0
    assert min(count_colors(picture)) > 50


def test_of_many_metrics_some_are_left_out_derived_ones_first(tmp_path):
    metrics = {f"metric/{number}": 1.0 for number in range(24)}
    run = write_run(tmp_path / "run", [{"a/best": 1.0, **metrics}])
    picture, left_out = draw_picture([run])
    assert left_out == 1
    assert count_colors(picture)[0] > 24 * 5


def test_a_name_with_dollar_signs_is_not_drawn_as_a_formula(tmp_path):
    assert draw_picture([write_run(tmp_path / "run", [{"loss/$\\bad$": 1.0}])])[1] == 0


def test_a_run_without_metrics_has_an_empty_picture(tmp_path):
    assert draw_picture([write_run(tmp_path / "run", [])])[0].startswith(b"\x89PNG")
