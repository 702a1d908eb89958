"""How a page of hundreds of runs behaves in a browser: its size, how soon it is there, how soon a filter has acted.

    python benchmarks/crowded_page.py [--quick] [--json FILE] [--keep FOLDER]

The comparison is made up: dense FedAvg, and methods at five sparsities with a random control each, over five seeds.
Nothing is trained. ``--keep`` leaves the page, and pictures of it in three sizes and two themes, in a folder.
A browser is needed (``apt-get install chromium``), and playwright (the extra ``test``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from secateur.learning.metrics import ACCURACY
from secateur.report import page
from secateur.report.outcomes import Outcome
from secateur.report.verdicts import DENSE, Group, Line, compare_groups

SEEDS, ROUNDS = 5, 100
SPARSITIES = (50, 80, 90, 95, 98)
SIZES = {"desktop": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
WHOLE = 20_000_000  # bytes of a client that is sent the dense model


def run(quality: float, sparsity: float, draw: np.random.Generator) -> Outcome:
    """Return the outcome of a run that reaches a quality, a little off, and saves what its sparsity does."""
    end = quality + draw.normal(0, 0.004)
    spent = WHOLE * (1.02 - sparsity) * draw.uniform(0.98, 1.02)
    scores = [end * (1 - 0.8 * 0.95**t) + draw.normal(0, 0.003) for t in range(1, ROUNDS + 1)]
    curves = [[(t * unit, score) for t, score in enumerate(scores, 1)] for unit in (1, spent / 10, 0.5)]
    return Outcome(
        ACCURACY, end, end - 0.02, end - 0.1, sparsity, round(20 * spent), 0.5 * ROUNDS * (2 - sparsity), 10_000_000,
        9_000_000, 500_000, *curves, client_bytes=round(spent), local_sparsity=sparsity,
        size=round(2_000_000 * (1.02 - sparsity)),
    )  # fmt: skip


def lines(families: int) -> list[Line]:
    """Return the lines of a comparison of some families of methods."""
    draw = np.random.default_rng(0)
    groups = [Group("FedAvg", DENSE, {seed: run(0.83, 0.0, draw) for seed in range(SEEDS)})]
    for n in range(families):
        for percent in SPARSITIES:
            quality = 0.84 - 0.01 * n - 0.25 * (percent / 100) ** 8
            for control, loss in (("", 0.0), ("random", 0.06)):
                name = f"Method {chr(65 + n)} {percent} %"
                runs = {seed: run(quality - loss, percent / 100, draw) for seed in range(SEEDS)}
                groups.append(Group(name, control, runs, "" if control else "FedAvg"))
    return compare_groups("dirichlet:0.3", groups)


def measure(index: Path, pictures: Path | None) -> dict[str, float]:
    """Return seconds until the page answers, until all is drawn, and until a filter has acted on tables and figures."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        began = time.perf_counter()
        tab.goto(index.as_uri())
        tab.locator("#compared tbody tr").first.wait_for()
        answers = time.perf_counter() - began
        tab.locator("#compared-differences .main-svg").first.wait_for()
        drawn = time.perf_counter() - began
        narrowed = tab.evaluate(
            """() => {
              const input = document.querySelector("#filter"), began = performance.now();
              input.value = "Method B";
              input.dispatchEvent(new Event("input"));
              document.querySelector("#compared table").getBoundingClientRect();
              return (performance.now() - began) / 1000;
            }"""
        )
        began = time.perf_counter()
        tab.wait_for_function("document.querySelectorAll('#compared-differences .ytick').length <= 6")
        redrawn = time.perf_counter() - began
        for name, (width, height) in SIZES.items() if pictures else ():
            for theme in ("light", "dark"):
                fresh = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                fresh.goto(index.as_uri())
                fresh.locator("#compared-differences .main-svg").first.wait_for()
                fresh.screenshot(path=str(pictures / f"{name}-{theme}.png"), full_page=True)
                fresh.close()
        browser.close()
    return {"answers": answers, "drawn": drawn, "tables filtered": narrowed, "figures filtered": redrawn}


def main() -> None:
    """Print a table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one family instead of six")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", type=Path, help="leave the page and its pictures here")
    given = parser.parse_args()
    shown = lines(1 if given.quick else 6)
    with tempfile.TemporaryDirectory() as place:
        out = given.keep or Path(place)
        index = page.write("A crowd", shown, [], out)
        facts: dict[str, Any] = {"lines": len(shown), "runs": sum(len(line.runs) for line in shown)}
        facts["bytes of data"] = (out / "data.js").stat().st_size
        facts |= measure(index, given.keep)
    for name, value in facts.items():
        print(f"{name:>18}  {value:.3g} s" if isinstance(value, float) else f"{name:>18}  {value:,}")
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
