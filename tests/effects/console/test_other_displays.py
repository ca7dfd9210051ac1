"""The live display leaves the rows to the bars of others, also in the pauses between these."""

from noether import TrainingIteration
from noether.effects.console.live import live_region
from noether.effects.console.live.live_region import LiveRegion, Looks
from noether.effects.console.live.live_view import RunView


class FakeRows:
    """Rows that only say whether they are shown."""

    are_shown = False

    def draw(self, lines):
        assert lines
        self.are_shown = True

    def remove(self):
        self.are_shown = False


def test_the_display_returns_only_some_seconds_after_the_last_bar_of_others(monkeypatch):
    view, rows = RunView(), FakeRows()
    view.newest = TrainingIteration(update=1), TrainingIteration()
    region = LiveRegion(view, rows, lambda: (80, 24), Looks(has_colors=False, has_signs=True))
    shown = {}
    for now_s, others in [(0.0, False), (0.25, True), (0.5, False), (2.0, True), (4.5, False), (5.5, False)]:
        monkeypatch.setattr(live_region, "monotonic", lambda: now_s)  # noqa: B023  # called in this turn
        monkeypatch.setattr(live_region, "others_draw", lambda: others)  # noqa: B023  # likewise
        region.tick()
        shown[now_s] = rows.are_shown
    assert shown == {0.0: True, 0.25: False, 0.5: False, 2.0: False, 4.5: False, 5.5: True}
