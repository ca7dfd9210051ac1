"""The report in a real browser: charts, hover, legend, keyboard, themes and a narrow window; nothing is fetched."""

import math
import os
import shutil

import numpy as np
import pytest

import noether
from noether.reports.html.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"), reason="needs Debian's chromium and chromium-driver"
)
LONG_NAME = "val/" + "a_metric_with_a_name_of_eighty_characters_" * 2
FIGURES = "Bokeh.index.roots.map((view) => view.model).filter((model) => model.type === 'Figure')"
COLOR = f"{FIGURES}[0].below[0].axis_label_text_color"
HOSTILE = "loss/</script><img src=x onerror=alert(1)>"


def write_run(path, scale):
    """Write a run with long, short, infinite and absent values, and names that are hard to show."""
    values = np.random.default_rng(0).normal(size=4000) * scale
    values[1234], values[2000:2010], values[3000] = 100.0, math.nan, math.inf
    with noether.open_run(path) as directory:
        (path / "config.yaml").write_text("run: {name: mine}\n")
        state = noether.TrainState()
        for update, value in enumerate(values.tolist()):
            state, event = state.advance(samples=4), noether.AfterUpdate(time_s=1e9 + update)
            directory.interpreter([noether.LogScalars({"noise": value})], state, event)
            if update % 1000 == 999:
                state = state.next_epoch()
                metrics = {"loss/val": scale / state.iteration.epoch, HOSTILE: 1.0, LONG_NAME: 2.0}
                metrics[f"loss/{'w' * 80}"] = 3.0
                event = noether.AfterEpoch(time_s=1e9 + update)
                directory.interpreter([noether.LogScalars(metrics), noether.SaveCheckpoint()], state, event)
    return noether.read_run(path)


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report([write_run(folder / "first", 1.0), write_run(folder / "second", 2.0)], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(report_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield Page(driver, report_path)
    driver.quit()


class Page:
    """The open report."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())
        driver.execute_script("document.getElementById('curves').scrollIntoView()")
        self.wait("return document.querySelectorAll('.chart[data-state=drawn]').length >= 3")

    def run(self, script):
        return self.driver.execute_script(script)

    def wait(self, script):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60).until(lambda _: self.run(script))

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def source(self, key, name, column):
        """Return a column of one source of data of the chart of a metric."""
        return self.run(
            f"""const id = [...document.querySelectorAll('.chart')].find((each) => each.closest('figure')
                .querySelector('h3').textContent === {key!r}).id;
            const view = Bokeh.index.roots.find((each) => each.el.closest('#' + id));
            const source = view.model.renderers.map((each) => each.data_source).find((each) => each.name === {name!r});
            return [...source.data[{column!r}]].map((each) => Number.isFinite(each) ? each : String(each));"""
        )


def test_the_page_fetches_nothing_and_reports_no_error(browser):
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}] == []
    assert browser.run("return document.querySelectorAll('img[src=x]').length") == 0


def test_a_chart_has_spikes_and_gaps(browser):
    values = browser.source("noise", "line0", "y")
    assert 100.0 in values
    assert "NaN" in values
    assert browser.source("noise", "ends0", "label") == ["first: infinity at update 3001"]
    assert browser.source("noise", "ends0", "marker") == ["triangle"]
    assert browser.source("noise", "ends0", "y") == [100.0]


def test_checkpoints_are_marked(browser):
    assert browser.source("loss/val", "marks1", "label")[0] == "second: checkpoint E1_U1000_S4000"


def test_hover_shows_the_value(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    x, y = browser.run(
        """const id = [...document.querySelectorAll('.chart')].find((each) => each.closest('figure')
            .querySelector('h3').textContent === 'loss/val').id;
        document.getElementById(id).scrollIntoView({block: 'center'});
        const view = Bokeh.index.roots.find((each) => each.el.closest('#' + id));
        const {left, top} = view.canvas_view.el.getBoundingClientRect();
        return [left + view.frame.x_scale.compute(2000), top + view.frame.y_scale.compute(1)];"""
    )
    ActionChains(browser.driver).move_by_offset(0, 0).perform()
    actions = ActionChains(browser.driver)
    actions.w3c_actions.pointer_action.move_to_location(round(x) - 4, round(y))
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()
    text = browser.wait(
        """const inside = (root) => [root, ...[...root.querySelectorAll('*')]
            .filter((each) => each.shadowRoot).flatMap((each) => inside(each.shadowRoot))];
        return inside(document.body).filter((root) => root.host?.className.includes?.('bk-Tooltip'))
            .map((root) => root.textContent).join(' ')"""
    )
    assert "second: 1 at update 2000" in text


def test_a_run_is_hidden_by_mouse_and_by_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    button = browser.find("button[data-run='1']")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert browser.source("loss/val", "line1", "x") == []
    assert len(browser.source("loss/val", "line0", "x")) == 4
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-pressed") == "true"
    assert len(browser.source("loss/val", "line1", "x")) == 4


def test_the_axis_the_scale_and_smoothing_change_all_charts(browser):
    browser.run(
        "const axis = document.getElementById('axis'); axis.value = 'epoch'; axis.dispatchEvent(new Event('change'))"
    )
    assert browser.source("loss/val", "line0", "x") == [1, 2, 3, 4]
    browser.run(
        "const each = document.getElementById('smoothing'); each.value = 0.5; each.dispatchEvent(new Event('input'))"
    )
    smooth = browser.source("loss/val", "smooth0", "y")
    assert smooth[:2] == pytest.approx([1.0, (0.25 + 0.25) / 0.75])
    browser.find("#log").click()
    browser.wait(f"return {FIGURES}.length >= 3 && {FIGURES}.every((figure) => figure.y_scale.type === 'LogScale')")
    browser.find("#log").click()


def test_the_time_axis_has_dates(browser):
    change = "axis.dispatchEvent(new Event('change'))"
    browser.run(f"const axis = document.getElementById('axis'); axis.value = 'clock'; {change}")
    assert browser.source("loss/val", "line0", "x") == [1000 * (1e9 + update) for update in (999, 1999, 2999, 3999)]
    browser.wait(f"return {FIGURES}[0].below[0].formatter.type === 'DatetimeTickFormatter'")
    browser.run(f"const axis = document.getElementById('axis'); axis.value = 'update'; {change}")


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0, 0.0002, 0.0004], ["0", "2e-4", "4e-4"]),
        ([0.1, 0.30000000000000004], ["0.1", "0.3"]),
        ([0, 2500, 5000], ["0", "2500", "5000"]),
        ([0, 200_000, 1_000_000], ["0", "0.2M", "1M"]),
        ([10_000, 15_000], ["10k", "15k"]),
    ],
)
def test_ticks_are_short(browser, ticks, texts):
    assert browser.run(f"return {FIGURES}[0].left[0].formatter.doFormat({ticks})") == texts


def test_a_narrow_window_needs_no_horizontal_scrolling(browser):
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_theme_changes_text_and_charts(browser):
    button = browser.find("#theme")
    before = browser.run("return " + COLOR)
    button.click()
    assert browser.run("return " + COLOR) != before
    assert button.get_attribute("aria-pressed") == "true"


def test_charts_below_the_screen_are_drawn_before_someone_prints(browser):
    browser.run("scrollTo(0, 0)")
    browser.wait("return [...document.querySelectorAll('.chart')].every((each) => each.dataset.state === 'drawn')")
    policy = browser.run("return document.querySelector('meta[http-equiv]').content")
    assert "unsafe-eval" not in policy
