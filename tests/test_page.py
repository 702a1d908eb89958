"""The page, in a real browser: every figure draws, switches work, nothing is asked of a network, axe is content."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from helpers import environment, play, small, tiny_shards
from secateur.comparison import grid
from secateur.comparison.suite import Suite
from secateur.errors import CheckpointError
from secateur.federation.folder import ROUNDS, SUMMARY, read_study
from secateur.report import figure_lines, page, tables
from secateur.report.gather import comparison_lines, gather
from test_comparison_figures import contrast, crowd, line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

SUITE = Suite.model_validate({
    "title": "Two ways to prune", "source": "digits", "seeds": [0, 1], "partitions": ["iid", "pathological:2"],
    "common": {"data.clients": 4, "participation": 1.0, "rounds": 3, "model.name": "smallcnn", "training.epochs": 1,
               "model.options.width": 4, "model.options.features": 8},
    "variants": {"AutoFLIP": {"method": "autoflip", "criterion.explore.epochs": 1},
                 "FedSparsify 80 %": {"method": "fedsparsify", "schedule.sparsity": 0.8}},
    "controls": ["dense", "random"],
})  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    cells = grid.run_suite(SUITE, out, jobs=2)
    tables.write(SUITE, cells, comparison_lines(SUITE, cells, out), out)
    title, lines, subjects, ended = gather([out])
    assert ended
    page.write(title, lines, subjects, out / "page")
    return out / "page"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play_:
        opened = play_.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark", "phone"])
def shown(request, browser, compared):
    options = {
        "light": {"viewport": {"width": 1280, "height": 900}},
        "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True},
    }[request.param]
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.said, tab.asked = [], []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda sent: tab.asked.append(sent.url))
    tab.goto((compared / "index.html").as_uri())
    tab.wait_for_selector("#looked .main-svg")
    yield tab
    assert tab.said == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in tab.asked)
    context.close()


@needs_browser
def test_every_figure_draws_with_words_for_those_who_do_not_see_it(shown, compared):
    wanted = [f"compared-{f['id']}" for f in page.read(compared / "data.js")["parts"][0]["figures"]]
    wanted += [f"looked-{f['id']}" for f in page.read(compared / "runs" / "0.js")["figures"]]
    assert wanted == [
        "compared-pareto", "compared-quality", "compared-fairness", "compared-differences",
        "looked-layers", "looked-traffic", "looked-guidance", "looked-clients", "looked-mask",
    ]  # fmt: skip
    for name in wanted:
        plot = shown.locator(f"#{name} .plot")
        assert plot.locator(".main-svg").count() >= 1
        drawn = plot.locator(".trace, .hm, .box, .point, .bars path, image").count()
        assert drawn > 0, name
        assert len(plot.get_attribute("aria-label")) > 20
    wide = shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert wide  # nothing sticks out, on a phone either


@needs_browser
def test_switches_change_what_is_drawn(shown):
    def title():
        return shown.locator("#compared-quality .xtitle").text_content()

    assert title() == "rounds"
    shown.get_by_label("bytes carried, both ways").check()
    assert title() == "bytes carried, both ways"
    shown.get_by_role("radio", name="client seconds", exact=True).check()
    assert title() == "client seconds"
    assert "iid, 2 seeds" in shown.locator("#compared").inner_text()
    shown.get_by_role("combobox", name="Partition").select_option(label="pathological:2")
    assert "pathological:2, 2 seeds" in shown.locator("#compared").inner_text()
    shown.get_by_role("combobox", name="Run").select_option(label="FedSparsify 80 %, pathological:2, seed 0")
    shown.locator("#looked pre", has_text='method = "fedsparsify"').wait_for(
        state="attached"
    )  # read when it is looked at
    assert shown.locator("#looked-guidance").count() == 0
    shown.get_by_role("button", name="Copy as LaTeX").click()
    shown.locator("#compared textarea, #compared button:has-text('Copied as LaTeX')").first.wait_for()


@needs_browser
def test_a_missing_part_is_told(browser, compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "page")
    (folder / "runs" / "1.js").unlink()
    tab = browser.new_page()
    tab.goto((folder / "index.html").as_uri())
    tab.wait_for_selector("#looked .main-svg")
    tab.get_by_role("combobox", name="Run").select_option(index=1)
    tab.get_by_text("runs/1.js is missing beside this page.").wait_for()
    tab.close()


@needs_browser
def test_axe_finds_no_serious_violation(shown):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(shown).response["violations"]
    shown.said.clear()  # axe itself asks for the style sheet, which a page from disk may not
    serious = [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in {"serious", "critical"}]
    assert serious == []


@needs_browser
def test_it_prints_without_its_switches(browser, compared):
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((compared / "index.html").as_uri())
    tab.wait_for_selector("#looked .main-svg")
    tab.emulate_media(media="print")
    assert not tab.get_by_role("combobox", name="Partition").is_visible()
    assert tab.locator("#compared table").is_visible()
    context.close()


@needs_browser
def test_every_figure_is_an_image_too(compared, tmp_path):
    """One part and one run of the page; kaleido draws them in the same browser."""
    facts = page.read(compared / "data.js")
    facts["parts"], facts["runs"] = facts["parts"][:1], facts["runs"][:1]
    (tmp_path / "data.js").write_text(f"window.SECATEUR = {json.dumps(facts)};\n")
    (tmp_path / "runs").mkdir()
    shutil.copy(compared / "runs" / "0.js", tmp_path / "runs")
    files = page.images(tmp_path)
    parts = [*facts["parts"], page.read(compared / "runs" / "0.js")]
    views = [view for part in parts for figure in part["figures"] for view in figure["views"]]
    assert len(files) == len(set(files)) == 2 * len(views)
    for file in files:
        head = file.read_bytes()[:300]
        assert head.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in head


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def test_runs_of_any_folder_are_drawn_beside_their_dense_twins(tmp_path, shards):
    for seed in (0, 1):
        study = small("fedsparsify", rounds=3, seed=seed)
        play(study, tmp_path / f"run{seed}", shards)
        play(study.dense(), tmp_path / f"run{seed}" / "dense", shards)
    title, lines, subjects, ended = gather([tmp_path / "run0", tmp_path / "run1"])
    assert (title, ended) == ("2 runs", True)
    assert [(line.name.split()[0], sorted(line.runs)) for line in lines] == [
        ("FedAvg", [0, 1]),
        ("fedsparsify", [0, 1]),
    ]
    page.write(title, lines, subjects, tmp_path / "page")
    assert page.read(tmp_path / "page" / "data.js")["runs"] == [{"name": "run0"}, {"name": "run1"}]
    layers = next(f for f in page.read(tmp_path / "page" / "runs" / "0.js")["figures"] if f["id"] == "layers")
    trace = layers["views"][0]["data"][0]
    rows = [json.loads(line) for line in (tmp_path / "run0" / ROUNDS).read_text().splitlines()]
    kept = [row["layers"][trace["name"]] for row in rows if row["layers"]]
    assert trace["y"] == pytest.approx([100 - 100 * count / (16 * 12) for count in kept])


def test_dense_twins_that_were_trained_otherwise_have_lines_of_their_own(tmp_path, shards):
    for name, rate in (("fast", 0.1), ("slow", 1e-6)):
        study = small("fedsparsify", f"training.lr={rate}", rounds=2)
        play(study, tmp_path / name, shards)
        play(study.dense(), tmp_path / name / "dense", shards)
    _, lines, _, _ = gather([tmp_path / "fast", tmp_path / "slow"])
    by_name = {line.name: line for line in lines if line.control == "dense"}
    assert set(by_name) == {"FedAvg, lr 0.1", "FedAvg, lr 1e-06"}
    for name, told in (("fast", "FedAvg, lr 0.1"), ("slow", "FedAvg, lr 1e-06")):
        summary = json.loads((tmp_path / name / "dense" / SUMMARY).read_text())
        assert by_name[told].runs[0].quality == summary["final"]["accuracy"]
        own = next(line for line in lines if line.name.endswith(read_study(tmp_path / name).hash()))
        assert own.differences["dense"].mean == own.runs[0].quality - by_name[told].runs[0].quality
    looks = figure_lines.looks([figure_lines.figure_line(line) for line in lines if line.control == "dense"])
    assert len({(look["color"], look["dash"], look["symbol"]) for look in looks}) == 2
    _, alone, _, _ = gather([tmp_path / "slow"])
    assert [line.name for line in alone if line.control == "dense"] == ["FedAvg"]  # there is no other


def test_a_personal_run_is_drawn_on_clients_own_rows(tmp_path, shards):
    study = small("dispfl", rounds=3)
    play(study, tmp_path / "own", shards)
    play(study.dense(), tmp_path / "own" / "dense", shards)
    play(small("fedsparsify", rounds=3), tmp_path / "shared", shards)
    title, lines, _, _ = gather([tmp_path / "own", tmp_path / "shared"])
    server, own = page.contents(title, lines, [])["parts"]
    assert (server["name"], own["name"]) == ("iid", "iid, clients' own rows")
    words = {part["name"]: " ".join(row[0] for row in part["tables"][-1]["rows"]).split() for part in (server, own)}
    known = {"FedAvg", "dispfl", "fedsparsify"}
    assert known.intersection(words["iid"]) == {"fedsparsify"}
    assert known.intersection(words["iid, clients' own rows"]) == known
    drawn = {f["id"]: f for f in own["figures"]}
    curves = drawn["quality"]["views"][0]["data"]
    assert [trace["name"].split()[0] for trace in curves] == ["dispfl"]  # the others were scored elsewhere on the way
    assert "on clients' own rows" in drawn["quality"]["title"]
    assert {view["name"] for view in drawn["pareto"]["views"]} == {
        "most bytes of one client", "bytes carried in all", "client seconds in all",
    }  # fmt: skip


def test_a_run_that_goes_on_is_drawn_so_far(tmp_path, shards):
    class Stop(Exception):
        pass

    def stop(event):
        if event.get("round") == 2 and event["event"] == "row":
            raise Stop

    with pytest.raises(Stop):
        play(small("fedsparsify", rounds=5), tmp_path / "run", shards, watch=stop)
    title, lines, subjects, ended = gather([tmp_path / "run"])
    assert not ended
    facts = page.contents(title, lines, [subject.name for subject in subjects], live=True)
    assert facts["live"]
    quality = next(figure for figure in facts["parts"][0]["figures"] if figure["id"] == "quality")
    assert quality["views"][0]["data"][-1]["x"] == [1, 2]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        gather([tmp_path])


SIZES = {
    "desktop": {"viewport": {"width": 1440, "height": 900}},
    "tablet, dark": {"viewport": {"width": 820, "height": 1180}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True},
}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    out = tmp_path_factory.mktemp("crowded")
    page.write("A crowd", crowd(), [], out)
    return out


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """FedAvg, and eleven methods that cost and reach nearly the same."""
    lines = [line("FedAvg", 0.95, control="dense", bytes_=10_000_000)]
    lines += [line(f"Method {n} 90 %", 0.8 + 0.003 * n, 0.9, bytes_=1_000_000 + 20_000 * n) for n in range(11)]
    out = tmp_path_factory.mktemp("clustered")
    page.write("A cluster", lines, [], out)
    return out


@contextmanager
def opened(browser, folder, size="desktop"):
    context = browser.new_context(**SIZES[size])
    tab = context.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((folder / "index.html").as_uri())
    tab.wait_for_selector("#compared figure:last-child .main-svg")
    yield tab
    assert said == []
    context.close()


BOXES = """selector => [...document.querySelectorAll(selector)].map(element => {
  const box = element.getBoundingClientRect();
  return [box.left, box.top, box.right, box.bottom];
})"""


def overlapping(boxes):
    """The pairs of boxes that share more than half a pixel."""
    return [
        (a, b) for a, b in itertools.combinations(boxes, 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > 0.5 and min(a[3], b[3]) - max(a[1], b[1]) > 0.5
    ]  # fmt: skip


def test_boxes_that_share_an_area_overlap():
    assert overlapping([(0, 0, 10, 10), (9, 9, 20, 20), (10, 0, 20, 9), (30, 30, 40, 40)]) == [
        ((0, 0, 10, 10), (9, 9, 20, 20))
    ]


@needs_browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["compared", "clustered"])
def test_names_beside_points_do_not_overlap_in_any_size(browser, request, which, size):
    folder = request.getfixturevalue(which)
    figure = next(f for f in page.read(folder / "data.js")["parts"][0]["figures"] if f["id"] == "pareto")
    with opened(browser, folder, size) as tab:
        for view in figure["views"]:
            tab.locator("#compared-pareto").get_by_label(view["name"], exact=True).check()
            boxes = tab.evaluate(BOXES, "#compared-pareto .annotation-text-g text")
            named = [trace["name"] for trace in view["data"] if trace.get("meta", {}).get("label")]
            assert overlapping(boxes) == []
            assert len(boxes) == len(named) > 0
            shown = tab.locator("#compared-pareto .annotation-text-g text").all_text_contents()
            key = [item.split(":")[0] for item in tab.locator("#compared-pareto .key li").all_inner_texts()]
            assert sorted(shown) == sorted(named) or (len(key) == len(named) and all(map(str.isdigit, shown)))
            left, top, right, bottom = tab.evaluate(BOXES, "#compared-pareto .plot")[0]
            assert all(left <= a and top <= b and c <= right and d <= bottom for a, b, c, d in boxes)


@needs_browser
def test_titles_of_axes_are_whole_on_a_phone_and_rounds_are_whole_numbers(browser, compared):
    with opened(browser, compared, "phone") as tab:
        tab.wait_for_selector("#looked-mask .main-svg")
        places = tab.locator("figure").count()
        titles = tab.evaluate(BOXES, ".xtitle, .ytitle")
        assert len(titles) > places
        assert all(left >= 0 and right <= 390 for left, _, right, _ in titles)
        plots = tab.evaluate(BOXES, ".plot")
        inside = [any(top >= p[1] - 0.5 and bottom <= p[3] + 0.5 for p in plots) for _, top, _, bottom in titles]
        assert all(inside)
        for name in ("#compared-quality", "#looked-layers"):
            assert tab.locator(f"{name} .xtick").all_text_contents() == ["1", "2", "3"]
        percent = tab.locator(".ytitle, .xtitle").all_text_contents()
        scores = [title for title in percent if "accuracy" in title and "points" not in title]
        assert len(scores) >= 4
        assert all(title.replace("\n", " ").endswith("%") for title in scores)


@needs_browser
def test_error_bars_are_seen_in_the_dark(browser, compared):
    with opened(browser, compared, "tablet, dark") as tab:
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        strokes = tab.evaluate(
            """() => [...document.querySelectorAll('.errorbar path, .errorbars path')].map(bar => {
              const style = getComputedStyle(bar);
              return [style.stroke, Number(style.strokeOpacity) * Number(style.opacity)];
            })"""
        )
        assert len(strokes) > 10
        assert all(opacity == 1 for _, opacity in strokes)

        def code(words):
            return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", words)[:3])

        assert min(contrast(code(stroke), code(paper)) for stroke, _ in strokes) >= 3


@needs_browser
def test_a_table_is_sorted_by_numbers_whatever_their_units(browser, crowded):
    """From 10 MB to 200 kB, by the lines themselves; the three names without such a column's number come last."""
    with opened(browser, crowded) as tab:
        table = tab.get_by_role("region", name="Table of iid, 2 seeds", exact=True)

        def names():
            return [name.removeprefix("* ") for name in table.locator("tbody tr:visible th").all_inner_texts()]

        plain = names()
        named = [line for line in crowd() if line.control in {"", "dense"}]
        by_bytes = [line.name for line in sorted(named, key=lambda line: -line.of("bytes").mean)]
        table.get_by_role("button", name="bytes", exact=True).click()
        assert names() == by_bytes != plain
        table.get_by_role("button", name="bytes", exact=True).click()
        assert names() == by_bytes[::-1]
        table.get_by_role("button", name="bytes", exact=True).click()
        assert names() == plain
        table.get_by_role("button", name="to random").click()  # 10.0 ± 5.0; FedAvg and FedPM have none
        assert names()[-2:] == ["FedAvg", "FedPM"]
        table.get_by_role("button", name="to random").click()
        assert names()[-2:] == ["FedAvg", "FedPM"]
        assert table.locator("th[aria-sort=ascending]").inner_text().startswith("to random")


@needs_browser
def test_a_filter_narrows_tables_and_figures(browser, crowded):
    with opened(browser, crowded) as tab:
        tab.get_by_role("searchbox", name="Filter").fill("method3 9")
        table = tab.get_by_role("region", name="Table of iid, 2 seeds", exact=True).locator("tbody tr:visible th")
        found = ["Method3 90 %", "Method3 95 %", "Method3 98 %"]
        assert table.all_inner_texts() == found
        tab.wait_for_function("document.querySelectorAll('#compared-differences .ytick').length === 3")
        assert sorted(tab.locator("#compared-fairness .ytick").all_text_contents()) == found
        drawn = "[...document.querySelectorAll('#compared-quality .legend li')].filter(item => !item.hidden).length"
        tab.wait_for_function(f"{drawn} === 3")
        assert tab.locator("#compared-quality .scatterlayer .trace").count() == 3  # hidden before: not on the front
        tab.get_by_role("searchbox", name="Filter").fill("nothing like it")
        tab.get_by_text("No line has a name like that.").last.wait_for()
        tab.get_by_role("searchbox", name="Filter").fill("")
        tab.wait_for_function("document.querySelectorAll('#compared-differences .ytick').length === 40")


def choose_all(tab):
    """Choose something other than what is there at first, everywhere; return a function that reads what is chosen."""
    tab.get_by_role("combobox", name="Partition").select_option(label="pathological:2")
    tab.get_by_role("combobox", name="Run").select_option(label="FedSparsify 80 %, pathological:2, seed 0")
    tab.get_by_role("combobox", name="Theme").select_option(label="dark")
    tab.get_by_role("searchbox", name="Filter").fill("fed")
    tab.get_by_label("client seconds", exact=True).check()
    tab.get_by_role("button", name="bytes", exact=True).click()
    tab.get_by_label("all columns").check()
    tab.locator("#looked pre", has_text='method = "fedsparsify"').wait_for(state="attached")
    tab.wait_for_selector("#looked-mask .main-svg")
    tab.evaluate("scrollTo(0, 1500)")

    def chosen():
        return {
            "choices": [tab.get_by_role("combobox", name=name).input_value() for name in ("Partition", "Run", "Theme")],
            "filter": tab.get_by_role("searchbox", name="Filter").input_value(),
            "theme": tab.evaluate("getComputedStyle(document.body).backgroundColor"),
            "view": tab.locator("#compared-quality .xtitle").text_content(),
            "rows": tab.locator("#compared tbody tr:visible th").all_inner_texts(),
            "columns": tab.locator("#compared thead th:visible").count(),
            "table": round(tab.evaluate(BOXES, "#compared table")[0][1]),  # where a reader sees it
        }

    return chosen


@needs_browser
def test_a_reload_keeps_what_was_chosen(browser, compared):
    with opened(browser, compared) as tab:
        chosen = choose_all(tab)
        before = chosen()
        assert before["view"] == "client seconds"
        assert all("Fed" in row for row in before["rows"])
        tab.reload()
        tab.locator("#looked pre", has_text='method = "fedsparsify"').wait_for(state="attached")
        tab.wait_for_selector("#looked-mask .main-svg")
        tab.wait_for_function("scrollY === 1500")
        assert chosen() == before


@needs_browser
def test_a_page_of_runs_that_go_on_follows_them_and_keeps_what_was_chosen(browser, compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "page")
    facts = page.read(folder / "data.js") | {"live": True}
    write_data(folder, facts)
    with opened(browser, folder) as tab:
        chosen = choose_all(tab)
        tab.get_by_role("searchbox", name="Filter").focus()
        tab.evaluate("scrollTo(0, 1500)")
        before = chosen()
        part = next(part for part in facts["parts"] if part["name"] == "pathological:2")
        part["tables"][-1]["rows"][0][1] = "99.9"
        write_data(folder, facts | {"title": "Further", "live": False})
        tab.get_by_role("heading", name="Further").wait_for()
        tab.get_by_text("99.9").wait_for(state="attached")
        assert chosen() == before
        assert tab.evaluate("document.activeElement.id") == "filter"
        assert tab.locator("#facts").inner_text() == ""


def write_data(folder, facts):
    (folder / "data.js").write_text(f"window.SECATEUR = {json.dumps(facts)};\n")


TEN_LINES = """\
import secateur, torch
from sklearn.datasets import load_digits
x, y = load_digits(return_X_y=True)
x, test = x / 16, (x[1500:] / 16, y[1500:])
net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
clients = {"rome": (x[:400], y[:400]), "oslo": (x[400:900], y[400:900]), "lima": (x[900:1500], y[900:1500])}
five = ["fedsparsify:sparsity=0.8", "prunefl", "oneshot", "feddst", "random"]
run = dict(rounds=2, seeds=1, controls=["dense", "random"], participation=1.0, lr=0.1, test=test, out="out")
found = secateur.compare(five, net, clients, **run)
print(found.table(), found.report())
"""


@needs_browser
def test_ten_lines_with_a_persons_model_and_arrays_end_in_a_page_that_opens(browser, tmp_path):
    (tmp_path / "mine.py").write_text(TEN_LINES)
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    index = tmp_path / done.stdout.split()[-1]
    with opened(browser, index.parent) as tab:
        text = tab.inner_text("body")
    for name in ("fedsparsify 80 %", "prunefl", "oneshot", "feddst", "random", "FedAvg", "fedsparsify 80 %: random"):
        assert name in text
