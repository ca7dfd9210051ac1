"""The live display is removed while another library shows a bar, and in the pauses between two such bars."""

from noether import TrainingIteration
from noether.effects.console.live import live_region
from noether.effects.console.live.live_region import LiveRegion, TerminalStyle
from noether.effects.console.live.live_view import RunView


class FakeRows:
    """Rows that record only whether they are shown."""

    are_shown = False

    def draw(self, lines):
        assert lines
        self.are_shown = True

    def remove(self):
        self.are_shown = False


def test_the_display_returns_three_seconds_after_the_last_bar_of_another_library(monkeypatch):
    view, rows = RunView(), FakeRows()
    view.newest = TrainingIteration(update=1), TrainingIteration()
    region = LiveRegion(view, rows, lambda: (80, 24), TerminalStyle(has_colors=False, has_unicode=True))
    shown = {}
    for now_s, others in [(0.0, False), (0.25, True), (0.5, False), (2.0, True), (4.5, False), (5.5, False)]:
        monkeypatch.setattr(live_region, "monotonic", lambda: now_s)  # noqa: B023  # called in this turn
        monkeypatch.setattr(live_region, "has_other_bar", lambda: others)  # noqa: B023  # likewise
        region.redraw()
        shown[now_s] = rows.are_shown
    assert shown == {0.0: True, 0.25: False, 0.5: False, 2.0: False, 4.5: False, 5.5: True}
