"""The page in headless Chromium, the system's, driven by Playwright."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.report.studies import write_ladder, write_run

from factorlm.records import RecordFile
from factorlm.report import (
    ReportRun,
    ScalingCurve,
    ScalingFits,
    Table,
    gather,
    read_run,
    report_fits,
    write_page,
)

ROOT = Path(__file__).parents[2]
sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install '.[dev]'")
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
HOSTILE = "<img src=x onerror=alert(1)><b>%{x}</b>&amp;"
Opener = Callable[..., Any]


def load_benchmark() -> Any:
    """``benchmarks/report_page.py``, which finds the browser and invents many runs."""
    path = ROOT / "benchmarks" / "report_page.py"
    spec = importlib.util.spec_from_file_location("report_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


benchmark_script = load_benchmark()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = benchmark_script.find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=list(benchmark_script.FLAGS)
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opener]:
    """``open_page(path, **context)`` gives a tab, which must not complain or ask for anything."""
    contexts, complaints = [], []

    def watch(tab: Any) -> None:
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))

    asked: list[str] = []

    def open_(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**(DESKTOP | options)))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        watch(tab)
        tab.goto(path.as_uri())
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@pytest.fixture
def page(study: Path, tmp_path: Path) -> Path:
    law = ScalingCurve(family="dense", compute=[1e5, 1e6], loss=[4, 3], low=[3.9, 2.8], high=[5, 4])
    return write_page(gather([study]), tmp_path / "report.html", ScalingFits(curves=[law]))


def drawn(tab: Any, chart: str) -> list[dict[str, Any]]:
    """The traces of a chart, once it is scrolled to and drawn."""
    tab.evaluate(f"document.getElementById('{chart}').scrollIntoView({{behavior: 'instant'}})")
    tab.wait_for_selector(f"#{chart} .main-svg")
    traces: list[dict[str, Any]] = json.loads(
        tab.evaluate(
            f"""JSON.stringify(document.getElementById('{chart}').data.map((trace) =>
            ({{...trace, x: Array.from(trace.x), y: Array.from(trace.y)}})))"""
        )
    )
    return traces


def names(tab: Any, chart: str) -> list[str]:
    return [trace["meta"] for trace in drawn(tab, chart)]


def rows(tab: Any) -> list[str]:
    """The runs of the table that can be seen, in order."""
    found: list[str] = tab.locator("#run-table tbody tr:visible th").all_inner_texts()
    return found


def check(tab: Any, name: str, value: str) -> None:
    tab.locator(f'input[name="{name}"][value="{value}"]').check()


@pytest.mark.parametrize("loss", ["validation", "training", "smoothed"])
@pytest.mark.parametrize("axis", ["num_tokens", "training_flops", "executed_flops", "seconds"])
def test_curves_draw_the_numbers_of_the_records(
    page: Path, study: Path, open_page: Opener, loss: str, axis: str
) -> None:
    tab = open_page(page)
    check(tab, "loss", loss)
    check(tab, "x", axis)
    runs = gather([study]).runs
    for trace, run in zip(drawn(tab, "curves"), runs, strict=True):
        assert trace["meta"] == run.label
        curve = run.validation if loss == "validation" else run.training
        np.testing.assert_array_equal(trace["x"], getattr(curve, axis))
        np.testing.assert_array_equal(trace["y"], expected_losses(run, loss))


def expected_losses(run: ReportRun, loss: str) -> list[float]:
    recorded = read_run(run.path)
    if loss == "validation":
        return [record.loss for record in recorded.evals]
    return [s.loss for s in recorded.steps] if loss == "training" else list(run.training.smoothed)


def test_logarithmic_axes(page: Path, open_page: Opener) -> None:
    tab = open_page(page)
    drawn(tab, "curves")
    kinds = "['xaxis', 'yaxis'].map((axis) => document.getElementById('curves').layout[axis].type)"
    assert tab.evaluate(kinds) == ["log", "linear"]
    tab.locator("#log-x").uncheck()
    tab.locator("#log-y").check()
    assert tab.evaluate(kinds) == ["linear", "log"]


def test_families_are_toggled_everywhere(page: Path, open_page: Opener) -> None:
    tab = open_page(page)
    assert rows(tab) == names(tab, "curves") == ["blocks", "dense-0", "dense-1", "low"]
    scaling = ["aid", "dense, fit", "block_dense", "dense", "low_rank, 32%"]
    assert names(tab, "scaling") == scaling
    tab.locator(".chip", has_text="2 runs").locator("input").uncheck()
    assert rows(tab) == names(tab, "curves") == ["blocks", "low"]
    assert names(tab, "scaling") == ["block_dense", "low_rank, 32%"]
    assert tab.locator("#differences tbody").first.locator("tr:visible").count() == 2
    assert tab.locator("#reproduce details:visible").count() == 2
    assert tab.locator("#shown").inner_text() == "2 of 4 runs"
    tab.locator("#none").click()
    assert rows(tab) == names(tab, "curves") == []
    tab.locator("#all").click()
    tab.locator("#filter").fill("DENSE-")
    assert rows(tab) == names(tab, "curves") == ["dense-0", "dense-1"]


def test_columns_sort_both_ways_by_value_and_unknown_ones_stay_last(
    write_run: Any, tmp_path: Path, open_page: Opener
) -> None:
    sizes = {"nine": 9, "ten": 10, "thousand": 1000}
    runs = [write_run(name, losses=[3.0] * n, num_evals=1) for name, n in sizes.items()]
    runs.append(write_run("unknown", num_evals=0))
    tab = open_page(write_page(gather(runs), tmp_path / "report.html"))
    loss = tab.get_by_role("button", name="best validation loss")
    tokens = tab.get_by_role("button", name="training tokens", exact=True)
    tokens.click()
    assert rows(tab) == ["nine", "ten", "unknown", "thousand"]
    assert tab.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    tokens.click()
    assert rows(tab) == ["thousand", "unknown", "ten", "nine"]
    assert tab.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    for _ in range(2):
        loss.click()
        assert rows(tab)[-1] == "unknown"
        assert tab.locator("th[aria-sort]").count() == 1


@pytest.fixture
def ladder(tmp_path: Path) -> tuple[Path, ScalingFits]:
    """A page of two families that have laws, one that has a single size, and a tuning run."""
    folder = write_ladder(tmp_path / "ladder", seeds=3, noise=0.01)
    labels = {"ladder": "books", "size": "w2", "family": "few", "stage": "main"}
    options: dict[str, Any] = {"num_params": 1e5, "num_tokens": 2e6, "flops": 2e12, "loss": 5.0}
    write_run(folder, "few", **options, labels=labels)
    write_run(folder, "steps", **options, labels=labels | {"stage": "calibration"})
    write_run(folder, "rate", **options, labels=labels | {"family": "dense", "stage": "tune"})
    report = gather([folder])
    fits = report_fits(report)
    return write_page(report, tmp_path / "report.html", fits), fits


def laws_of(traces: list[dict[str, Any]]) -> list[tuple[str, list[float], list[float]]]:
    """Family, loss and band of every law that is drawn."""
    bands = [trace["y"] for trace in traces if trace["meta"] == "aid"]
    fits = [trace for trace in traces if trace["meta"].endswith(", fit")]
    return [(f["meta"], f["y"], band) for f, band in zip(fits, bands, strict=True)]


def test_laws_and_bands_are_those_of_the_fit(
    ladder: tuple[Path, ScalingFits], open_page: Opener
) -> None:
    path, fits = ladder
    tab = open_page(path)
    for law in fits.laws:
        check(tab, "law", law)
        assert laws_of(drawn(tab, "scaling")) == [
            (f"{c.family}, fit", c.loss, [*c.high, *c.low[::-1]])
            for c in fits.curves
            if c.law == law
        ]
    check(tab, "law", "")
    assert laws_of(drawn(tab, "scaling")) == []
    for title, table in fits.tables.items():
        cells = tab.get_by_role("table", name=title).locator("tbody tr")
        assert [row.split("\t") for row in cells.all_inner_texts()] == [list(r) for r in table.rows]


def test_a_family_and_its_law_are_toggled_together(
    ladder: tuple[Path, ScalingFits], open_page: Opener
) -> None:
    tab = open_page(ladder[0])
    assert names(tab, "scaling")[1:4:2] == ["dense, fit", "low_rank_32, fit"]
    tab.locator(".chip", has_text="dense").locator("input").uncheck()
    assert names(tab, "scaling") == ["aid", "low_rank_32, fit", "few", "low_rank_32"]
    tab.locator("#filter").fill("few")
    assert names(tab, "scaling") == ["few"]


def test_why_a_law_is_missing_and_what_tunes_is_said(
    ladder: tuple[Path, ScalingFits], open_page: Opener
) -> None:
    tab = open_page(ladder[0])
    (dense,) = [trace for trace in drawn(tab, "scaling") if trace["meta"] == "dense"]
    assert sorted(set(dense["marker"]["symbol"])) == ["circle", "x"]
    assert all("steps" not in trace.get("text", ()) for trace in drawn(tab, "scaling"))
    assert "1 run not drawn" in tab.locator("#scaling-missing").inner_text()
    assert dense["marker"]["symbol"][dense["text"].index("rate")] == "x"
    tab.get_by_text("What is not fitted, and why").click()
    *missing, means = tab.locator("#scaling-section li").all_inner_texts()
    assert missing == [
        "Left out, of stage tune, not main: rate.",
        "Left out, of stage calibration, not main: steps.",
        "Not fitted, fewer than 3 sizes: few.",
    ]
    assert means.startswith("Straight lines are fitted to the mean of each size: ")
    tab.locator("#scaling").focus()
    for key in ("ArrowDown", "ArrowUp"):
        tab.keyboard.press(key)
    said = tab.locator("#scaling-readout").inner_text()
    assert said.startswith("dense, fit: last validation loss ")
    hover = "document.querySelector('#scaling .hoverlayer').textContent"
    tab.wait_for_function(f"{hover}.includes('band ')")


def test_scaling_speed_and_monitors(page: Path, study: Path, open_page: Opener) -> None:
    tab = open_page(page)
    band, fit, *families = drawn(tab, "scaling")
    assert (fit["y"], band["y"]) == ([4, 3], [5, 4, 2.8, 3.9])
    points = {(x, y) for trace in families for x, y in zip(trace["x"], trace["y"], strict=True)}
    assert points == {
        (run.metrics["executed_flops"], run.metrics["last_validation_loss"])
        for run in gather([study]).runs
    }
    dense, low_rank = drawn(tab, "speed")
    assert (dense["y"], low_rank["y"]) == ([2, 128], [1, 64])
    check(tab, "speed", "speedup")
    assert [t["y"] for t in drawn(tab, "speed") if t["meta"] == "low_rank"] == [[2, 2]]
    assert len(drawn(tab, "monitors")) == 4
    tab.locator("#monitor-panel").select_option("share of the guide, α")
    (share,) = drawn(tab, "monitors")
    monitors = list(RecordFile(study / "low" / "records.jsonl"))
    assert share["y"] == [r.guide_alpha for r in monitors if r.type == "monitor"]


def test_monitors_are_of_a_run_that_is_shown(
    study: Path, write_run: Any, tmp_path: Path, open_page: Opener
) -> None:
    """Of the runs with monitors, those of the families and names that are chosen can be."""
    other = write_run("other", structure={"structure": "dense"}, is_monitored=True)
    tab = open_page(write_page(gather([study, other]), tmp_path / "report.html"))
    select = tab.locator("#monitor-run")

    def offered() -> list[str]:
        found: list[str] = select.locator("option:enabled").all_inner_texts()
        return found

    def shown() -> str:
        drawn(tab, "monitors")
        return str(tab.locator("#monitors").get_attribute("aria-label"))

    assert offered() == ["low", "other"]
    assert shown().endswith("run low")
    tab.locator("#filter").fill("other")
    assert offered() == ["other"]
    assert shown().endswith("run other")
    tab.locator("#filter").fill("")
    assert offered() == ["low", "other"]
    assert shown().endswith("run other"), "what was chosen stays"
    tab.locator("#none").click()
    assert offered() == drawn(tab, "monitors") == []
    assert shown() == "no run with monitors is shown"
    tab.locator("#all").click()
    assert shown().endswith("run low")


def wait_for_label(tab: Any, text: str) -> None:
    """Plotly writes it some time after the event."""
    tab.wait_for_function(
        "(text) => document.querySelector('#curves .hoverlayer').textContent.includes(text)",
        arg=text,
    )


def test_values_by_keyboard_and_by_pointer(page: Path, open_page: Opener, study: Path) -> None:
    tab = open_page(page)
    drawn(tab, "curves")
    tab.locator("#curves").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    evaluation = read_run(study / "dense-0").evals[1]
    said = tab.locator("#curves-readout")
    assert said.inner_text() == (
        f"dense-0: validation loss {evaluation.loss:.6g}, tokens {evaluation.num_tokens:,}"
    )
    assert said.get_attribute("aria-live") == "polite"
    wait_for_label(tab, f"loss {evaluation.loss:.4f}")
    tab.keyboard.press("Escape")
    point = tab.locator("#curves .scatterlayer .point").last.bounding_box()
    tab.mouse.move(point["x"] + 3, point["y"] + 3)
    low = read_run(study / "low")
    assert low.last is not None
    wait_for_label(tab, f"loss {low.last.loss:.4f}")


def test_everything_is_reached_and_named_by_keyboard(page: Path, open_page: Opener) -> None:
    tab = open_page(page)
    for chart in ("curves", "scaling", "speed", "monitors"):
        drawn(tab, chart)
        assert tab.locator(f"#{chart}").get_attribute("aria-label")
    reached = set()
    for _ in range(400):
        tab.keyboard.press("Tab")
        active = "document.activeElement"
        reached.add(tab.evaluate(f"{active}.id || {active}.name || {active}.textContent.trim()"))
    wanted = {
        "training tokens",
        "curves",
        "scaling",
        "speed",
        "monitors",
        "family",
        "loss",
        "x",
        "log-y",
        "filter",
    }
    assert wanted | {"speed-panel", "monitor-run", "monitor-panel", "dense-0"} <= reached
    unnamed = tab.evaluate(
        """[...document.querySelectorAll("input, select, button, a, [tabindex]")].filter((node) =>
        !(node.labels?.length || node.textContent.trim() || node.getAttribute("aria-label")))
        .map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    first = tab.locator("#run-table tbody th a").first
    first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#run-0[open] pre").first.is_visible()


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_sideways_scrolling(
    study: Path, write_run: Any, tmp_path: Path, open_page: Opener, options: dict[str, Any]
) -> None:
    long = "a_name_that_is_longer_than_any_phone_is_wide_and_has_no_space_in_it" * 3
    runs = [study, write_run(long, structure={"structure": long})]
    law = ScalingCurve(family=long, compute=[1e5, 1e6], loss=[4, 3])
    table = Table(header=("family", "slope"), rows=((long, "-0.05"),))
    fits = ScalingFits(curves=[law], tables={long: table}, notes=[long, long])
    tab = open_page(write_page(gather(runs), tmp_path / "report.html", fits), **options)
    for chart in ("curves", "scaling", "speed", "monitors"):
        drawn(tab, chart)
    for details in tab.locator("details").all():
        details.evaluate("(node) => { node.open = true; }")
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width == options["viewport"]["width"]
    charts = tab.locator(".chart .main-svg").all()
    assert charts
    assert all(chart.bounding_box()["width"] <= width for chart in charts)


def luminance(color: str) -> float:
    """Of a CSS ``rgb()``, by WCAG 2."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(page: Path, open_page: Opener, scheme: str) -> None:
    tab = open_page(page, color_scheme=scheme)
    drawn(tab, "curves")
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector, style in (("body", "color"), (".quiet", "color"), ("a", "color"),
                            ("#curves .xtick text", "fill")):  # fmt: skip
        ink = luminance(tab.locator(selector).first.evaluate(f"(n) => getComputedStyle(n).{style}"))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_have_contrast_in_light_and_dark(page: Path, open_page: Opener, scheme: str) -> None:
    """Every colour of the series, and every shade of the monitors' depths: 3 by WCAG 2, 1.4.11."""
    tab = open_page(page, color_scheme=scheme)
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    light = tab.evaluate("css('--depth-light')")
    lines = [
        *tab.evaluate("readColors()"),
        *(f"hsl({hue}, 70%, {light})" for hue in range(30, 211)),
    ]
    as_rgb = """(color) => { document.body.style.outlineColor = color;
        return getComputedStyle(document.body).outlineColor; }"""
    for line in lines:
        ink = luminance(tab.evaluate(as_rgb, line))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 3, line


def test_the_charts_follow_when_the_scheme_changes(page: Path, open_page: Opener) -> None:
    tab = open_page(page, color_scheme="light")
    before = drawn(tab, "curves")[0]["line"]["color"]
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(
        "(before) => document.getElementById('curves').data[0].line.color !== before", arg=before
    )


def test_hostile_names_are_shown_as_they_are(
    write_run: Any, tmp_path: Path, open_page: Opener
) -> None:
    run = write_run(HOSTILE, structure={"structure": HOSTILE}, is_monitored=True)
    tab = open_page(write_page(gather([run]), tmp_path / "report.html"))
    assert rows(tab) == [HOSTILE]
    for chart in ("curves", "scaling", "monitors"):
        drawn(tab, chart)
        tab.locator(f"#{chart}").focus()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_selector(f"#{chart} .hoverlayer text")
    assert HOSTILE in tab.locator("#curves .hoverlayer").text_content()
    assert HOSTILE in tab.locator("#scaling .hoverlayer").text_content()
    assert HOSTILE in tab.locator("#curves-readout").inner_text()
    assert tab.locator("img").count() == 0


def test_benchmarks_alone(study: Path, tmp_path: Path, open_page: Opener) -> None:
    tab = open_page(write_page(gather([study / "speed.jsonl"]), tmp_path / "report.html"))
    assert len(drawn(tab, "speed")) == 2


@pytest.mark.slow
def test_300_runs_of_5000_steps_open(tmp_path: Path, open_page: Opener) -> None:
    """How fast is measured by ``benchmarks/report_page.py``; a test does not time."""
    benchmark_script.write_runs(tmp_path / "runs", 300, 5000)
    path = write_page(gather([tmp_path / "runs"]), tmp_path / "report.html")
    assert path.stat().st_size < 12e6
    tab = open_page(path)
    assert len(drawn(tab, "curves")) == 300
    check(tab, "loss", "training")
    assert {len(trace["x"]) for trace in drawn(tab, "curves")} <= set(range(150, 201))
    assert len(rows(tab)) == 300
