"""Large comparisons: variants by sparsity, and figures and tables that do not drown in a hundred lines."""

import dataclasses
import re
import shutil
from importlib import resources

import pytest

from secateur.learning.metrics import ACCURACY, MAE
from secateur.report import comparison_figures, drawing, figure_lines, page, run_figures, tables
from secateur.report.outcomes import Outcome
from secateur.report.statistics import Interval
from secateur.report.verdicts import Line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SPARSITIES = (50, 80, 90, 95, 98)


def outcome(quality, sparsity=0.0, *, local=0.5, local_sparsity=None, bytes_=1000, metric=ACCURACY):
    made = Outcome(metric, quality, local, 0.25, sparsity, bytes_, 1.5, 10, 10, 10,
                   ((1.0, quality / 2), (2.0, quality)), ((bytes_ / 2, quality / 2), (bytes_, quality)))  # fmt: skip
    own = sparsity if local_sparsity is None else local_sparsity
    return dataclasses.replace(made, local_sparsity=own, size=round(4000 * (1 - sparsity)))


def line(variant, quality, sparsity=0.0, *, control="", differences=None, front=False, better=frozenset(), **more):
    runs = {seed: outcome(quality, sparsity, **more) for seed in (0, 1)}
    return Line("iid", variant, control, runs, differences or {}, front=front, better=better)


def crowd():
    """Eight families at five sparsities, each with a random control; FedAvg and a method without a sparsity."""
    made = [line("FedAvg", 0.95, control="dense", bytes_=10_000_000)]
    for n in range(8):
        for sparsity in SPARSITIES:
            name = f"Method{n} {sparsity} %"
            size = 100_000 * (100 - sparsity) * (1 + n / 10)
            differences = {"dense": Interval(-0.1, 0.01, 2), "random": Interval(0.1, 0.05, 2)}
            quality = 0.9 - sparsity / 500 - n / 100
            made.append(line(name, quality, sparsity / 100, bytes_=size, front=n == 0, differences=differences))
            made.append(line(name, 0.5, sparsity / 100, control="random", bytes_=size))
    return [*made, line("FedPM", 0.7, 0.4, bytes_=9_000_000)]


def test_variants_stand_by_sparsity_with_the_controls_they_beat():
    worse = Interval(0.1, 0.2, 2)
    found = [
        line("FedAvg", 0.9, control="dense"),
        line("A 50 %", 0.8, better=frozenset({"ramped", "narrow", "random"})),
        line("A 90 %", 0.7, differences={"random": worse}, bytes_=2000),
        line("A 90 %", 0.1, control="random"),
        line("B, T_p 87.5 %", 0.6),
        line("FedPM", 0.5),
    ]
    assert tables.by_sparsity(found, "iid") == [
        {"method": "FedAvg", "as it is": "90.0", "50 %": "", "87.5 %": "", "90 %": ""},
        {"method": "A", "as it is": "", "50 %": "80.0 rpn", "87.5 %": "", "90 %": "70.0"},
        {"method": "B, T_p", "as it is": "", "50 %": "", "87.5 %": "60.0", "90 %": ""},
        {"method": "FedPM", "as it is": "50.0", "50 %": "", "87.5 %": "", "90 %": ""},
    ]
    assert tables.by_sparsity(found, "iid", "bytes")[1] == {
        "method": "A", "as it is": "", "50 %": "1 kB", "87.5 %": "", "90 %": "2 kB",
    }  # fmt: skip
    assert tables.by_sparsity(found, "iid", "local")[1]["90 %"] == "50.0"


def test_one_sparsity_makes_no_table():
    assert tables.by_sparsity([line("FedAvg", 0.9, control="dense"), line("A 80 %", 0.8), line("B", 0.7)], "iid") == []


def test_an_error_is_no_percentage():
    found = [line("A 50 %", 4.25, metric=MAE), line("A 80 %", 4.5, metric=MAE)]
    assert tables.by_sparsity(found, "iid") == [{"method": "A", "50 %": "4.25", "80 %": "4.50"}]


def drawn(lines):
    return [figure_lines.figure_line(line) for line in lines]


def test_quality_by_sparsity_has_a_line_for_each_family_and_the_random_controls():
    figure = comparison_figures.sparsities(drawn(crowd()))
    data = {trace["name"]: trace for trace in figure["views"][0]["data"]}
    assert list(data) == ["random mask, the control of each", *(f"Method{n}" for n in range(8)), "FedAvg"]
    assert data["Method0"]["x"] == pytest.approx([0.5, 0.2, 0.1, 0.05, 0.02])
    assert data["Method0"]["y"] == pytest.approx([80, 74, 72, 71, 70.4])  # in percent, as in the tables
    assert data["random mask, the control of each"]["y"] == [50] * 40
    assert data["FedAvg"]["x"] == pytest.approx([0.5, 0.02])
    assert "Method0 80.0 % at 50.0 % to 70.4 % at 98.0 %" in figure["alt"]


def test_a_personal_method_is_drawn_where_its_clients_are():
    """What it ships is dense: it has no line in the shipped model's view, but one in that of clients' own models."""
    found = [line(f"Sub-FedAvg {s} %", 0.8, 0.0, local=s / 100, local_sparsity=s / 100) for s in SPARSITIES]
    shipped = [line(f"FedSparsify {s} %", 0.7, s / 100) for s in SPARSITIES]
    views = comparison_figures.sparsities(drawn([*found, *shipped]))["views"]
    names = [[trace["name"] for trace in view["data"]] for view in views]
    assert names == [["FedSparsify"], ["Sub-FedAvg", "FedSparsify"]]
    assert views[1]["data"][0]["x"] == pytest.approx([0.5, 0.2, 0.1, 0.05, 0.02])
    assert views[1]["data"][0]["y"] == pytest.approx([50, 80, 90, 95, 98])


def test_two_sparsities_make_no_line():
    assert comparison_figures.sparsities(drawn([line("A 50 %", 0.8, 0.5), line("A 80 %", 0.7, 0.8)])) == {}


def test_a_crowd_shows_its_front_and_names_only_that():
    lines = drawn(crowd())
    view = comparison_figures.quality(lines)["views"][0]
    shown = [trace["name"] for trace in view["data"] if trace["visible"] is True]
    assert shown == ["FedAvg", *(f"Method0 {sparsity} %" for sparsity in SPARSITIES)]
    assert not any(trace["name"].endswith(": random") for trace in view["data"])
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in view["data"][1:6]}) == 5
    points = comparison_figures.pareto(lines)["views"][0]["data"][1:]
    assert [trace["name"] for trace in points if trace["meta"]["label"]] == [
        "FedAvg", "Method0 50 %", "Method0 80 %", "Method0 90 %", "Method0 95 %", "Method0 98 %",
    ]  # fmt: skip


def test_no_two_lines_of_a_figure_look_alike():
    """Also two FedAvgs, more variants than colours, each with every control, and a model of a hundred layers."""
    kinds = ("", "random", "ramped", "shuffled", "narrow")
    few = [line("FedAvg", 0.9, control="dense"), line("FedAvg, momentum", 0.9, control="dense")]
    few += [line(f"M{n}", 0.8, control=kind) for n in range(20) for kind in kinds]
    for lines in (few, [*crowd(), *few[:2]], [line(f"M{n}", 0.8) for n in range(300)]):
        traces = comparison_figures.quality(drawn(lines))["views"][0]["data"]
        looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in traces]
        assert len(set(looks)) == len(looks) > 20
    sizes = {f"layer{n}": 10 for n in range(100)}
    rows = [{"phase": "train", "round": t, "layers": dict.fromkeys(sizes, 5)} for t in (1, 2, 3)]
    traces = run_figures.layers(rows, sizes)["views"][0]["data"]
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in traces}) == 100


def luminance(colour):
    """Relative luminance by WCAG 2.2's definition."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_are_seen_in_both_themes():
    """WCAG 2.2, 1.4.11: graphics need 3 : 1 against what is behind them."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = resources.files("secateur.report").joinpath("web/page.css").read_text()
    papers = re.findall(r"--paper: (#\w{6})", css)
    assert len(papers) == 2
    assert min(contrast(colour, paper) for colour in (*drawing.COLOURS, drawing.GREY) for paper in papers) >= 3


@pytest.mark.parametrize("most", range(1, 400, 7))
def test_rounds_are_counted_in_whole_numbers(most):
    axis = drawing.counted(most)
    assert axis["dtick"] == int(axis["dtick"]) >= 1
    assert axis["tickformat"] == "d"
    assert 1 <= most // axis["dtick"] <= 8


def test_few_lines_show_all_and_name_all():
    lines = drawn([line("FedAvg", 0.9, control="dense"), line("A", 0.8), line("A", 0.1, control="random")])
    view = comparison_figures.quality(lines)["views"][0]
    assert [trace["visible"] for trace in view["data"]] == [True, True, "legendonly"]
    assert [trace["mode"] for trace in comparison_figures.pareto(lines)["views"][0]["data"]] == [
        "lines", "markers", "markers", "markers",
    ]  # fmt: skip


def test_each_cost_has_a_front_of_its_own():
    """A costs the fewest bytes, B ships the smallest model, C is the best; all take as many seconds."""
    found = [line("A", 0.7, 0.5, bytes_=500), line("B", 0.6, 0.9), line("C", 0.9, bytes_=1000)]
    figure = comparison_figures.pareto(drawn(found))
    fronts = {v["name"]: list(zip(v["data"][0]["x"], v["data"][0]["y"], strict=True)) for v in figure["views"]}
    assert fronts == {
        "bytes carried in all": [(500.0, 70.0), (1000.0, 90.0)],
        "client seconds in all": [(1.5, 90.0)],
        "bytes of the shipped model": [(400.0, 60.0), (2000.0, 70.0), (4000.0, 90.0)],
    }
    assert figure["alt"] == (
        "On the front for all bytes: A with 70.0 % for 500 B; C with 90.0 % for 1 kB. "
        "On the front for client seconds: C with 90.0 % for 1.5 s. "
        "On the front for the shipped model's size: B with 60.0 % for 400 B; A with 70.0 % for 2 kB; "
        "C with 90.0 % for 4 kB."
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_large_page_keeps_its_controls_back_until_they_are_asked_for(tmp_path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    index = page.write("A crowd", crowd(), [], tmp_path)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        said = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(index.as_uri())
        tab.wait_for_selector("#compared-differences .main-svg")
        assert [head.inner_text() for head in tab.locator("#compared > div > h3").all()] == [
            "By sparsity, iid, 2 seeds", "On clients' own rows, by sparsity, iid, 2 seeds",
            "Bytes, by sparsity, iid, 2 seeds", "iid, 2 seeds",
        ]  # fmt: skip
        table = tab.get_by_role("region", name="Table of iid, 2 seeds", exact=True).locator("tbody tr:visible")
        assert table.count() == 42
        tab.get_by_label("a line for each control").check()
        assert table.count() == 82
        tab.get_by_label("clients' own models, on their own rows").check()
        assert tab.locator("#compared-sparsities .xtitle").text_content() == "sparsity"
        names = tab.locator("#compared-differences .ytick").count()
        assert names == 40  # each is named
        assert said == []
        found = Axe().run(tab).response["violations"]
        assert [v["id"] for v in found if v["impact"] in {"serious", "critical"}] == []
        browser.close()
