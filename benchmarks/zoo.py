"""What secateur finds in architectures as people write them: units, what stays whole, and whether slim equals masked.

    python benchmarks/zoo.py [--quick] [--json FILE] [--render docs/structure.md] [NAME ...]

The architectures are those of ``tests/architectures``: small, own code, in the idioms of torchvision, timm and Hugging
Face. *whole* is the share of the MACs (of layers' weights) in layers whose outputs are not units; *half* is what is
left of a model's MACs, by torch's counter, when half of each layer's units are gone; *slim = masked* is by how much
they differ in double precision, in training and in evaluation mode; *ONNX* in single precision, not with ``--quick``.
Left of an arrow is what the code of 2026-11-26 found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pages import insert

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures import ZOO
from architectures.measure import measure

BEFORE = json.loads((Path(__file__).parent / "zoo_before.json").read_text())
"""What the code of 2026-11-26, which followed a ``torch.fx`` trace, found in the same architectures."""
LEAST = 0.05  # share of the MACs of a layer that the table names


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| architecture | units | blocks | whole | half | slim = masked | ONNX | largest layers left whole |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        was = BEFORE[row["architecture"]]
        whole = sorted(row.get("whole", {}).items(), key=lambda item: -item[1][1])
        units = row.get("units", {})
        heads = f" + {units['head']} heads" if units.get("head") else ""
        shown = [f"`{name}` {share:.0%}: {reason}" for name, (reason, share) in whole[:2] if share >= LEAST]
        cells = [
            row["architecture"], f"{was['units']} → {units.get('channel', 0)}{heads}", str(units.get("block", 0)),
            f"{was['whole']:.0%} → {sum(share for _, share in row.get('whole', {}).values()):.0%}",
            f"{was['left']:.2f} → {row['left']:.2f}" if "left" in row else "",
            f"{row['apart']:.0e}" if "apart" in row else "",
            f"{row['onnx']:.0e}" if "onnx" in row else "",
            row.get("failed", "; ".join(shown)).replace("|", "\\|"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, metavar="PAGE")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="render these rows and measure nothing")
    parser.add_argument("names", nargs="*", choices=[*ZOO, []])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rows and given.render:
        insert(given.render, "zoo", table(json.loads(given.rows.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = None if given.quick else Path(folder) / "model.onnx"
        rows = []
        for name in given.names or ZOO:
            rows.append(measure(name, path))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if given.render:
        insert(given.render, "zoo", table(rows))


if __name__ == "__main__":
    main()
