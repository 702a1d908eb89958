"""Figures of a single run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.drawing import Figure, colour, dash, figure, layout, view
from secateur.report.formatting import size


def layers(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> Figure:
    """Return the figure of each layer's sparsity over a run's rounds."""
    trained = [row for row in rows if row["phase"] == "train" and row.get("layers")]
    if not trained:
        return {}
    names = [name for name in trained[-1]["layers"] if sizes.get(name)]
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": [row["round"] for row in trained],
            "y": [1 - row["layers"].get(name, sizes[name]) / sizes[name] for row in trained],
            "line": {"color": colour(n), "dash": dash(n)},
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    alt = "; ".join(f"{trace['name']} ends at {100 * trace['y'][-1]:.1f} %" for trace in traces)
    return figure("layers", "Sparsity of each layer", f"{alt}.", [view(traces, layout("rounds", "sparsity"))])


def traffic(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of the bytes of each exchange, by direction and part."""
    parts = [(way, part) for way in ("down", "up") for part in dict.fromkeys(p for row in rows for p in row[way])]
    labels = [f"{row['phase'] if row['phase'] != 'train' else ''} {row['round']}".strip() for row in rows]
    traces = [
        {
            "type": "bar", "name": f"{way}, {part}", "x": list(range(len(rows))), "text": labels,
            "textposition": "none", "y": [row[way].get(part, 0) for row in rows], "marker": {"color": colour(n)},
        }
        for n, (way, part) in enumerate(parts)
        if any(row[way].get(part) for row in rows)
    ]  # fmt: skip
    total = sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    frame = {**layout("exchanges", "bytes"), "barmode": "stack"}
    alt = f"{len(rows)} exchanges carried {size(total)}: the first {size(_carried(rows[0]))}, the last "
    alt += f"{size(_carried(rows[-1]))}."
    return figure("traffic", "Bytes of each exchange", alt, [view(traces, frame)])


def relayed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of the bytes of each exchange between the server and its relays, and of those below them."""
    if not any("relayed" in row for row in rows):
        return {}
    tiers = {
        f"{tier}, {way}": [of(row, way) for row in rows]
        for tier, of in (("server and relays", _above), ("relays and clients", _below))
        for way in ("down", "up")
    }
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": list(range(len(rows))), "y": carried,
            "line": {"color": colour(n), "dash": dash(n)},
        }
        for n, (name, carried) in enumerate(tiers.items())
    ]  # fmt: skip
    sent = [row["relayed"] for row in rows if "relayed" in row]
    alt = "; ".join(f"{name}: {size(sum(carried))}" for name, carried in tiers.items())
    alt += f"; relays sent {sum(one['sums'] for one in sent)} sums and {sum(one['single'] for one in sent)} replies."
    return figure("relayed", "Bytes by tier", alt, [view(traces, layout("exchanges", "bytes"))])


def _above(row: Mapping[str, Any], way: str) -> int:
    return int(row.get("relayed", {}).get(way, 0))


def _below(row: Mapping[str, Any], way: str) -> int:
    return int(row[f"bytes_{way}"])


def histogram(name: str, of: Mapping[str, Sequence[int]]) -> Figure:
    """Return the figure of how a value of each weight is distributed over [0, 1], tensor by tensor."""
    traces = []
    for n, (tensor, counts) in enumerate(of.items()):
        middles = [(k + 0.5) / len(counts) for k in range(len(counts))]
        total = max(1, sum(counts))
        traces.append(
            {
                "type": "scatter", "mode": "lines", "line": {"shape": "hvh", "color": colour(n), "dash": dash(n)},
                "name": tensor, "x": middles, "y": [count / total for count in counts],
            }
        )  # fmt: skip
    alt = "; ".join(f"{tensor}: {100 * counts[0] / max(1, sum(counts)):.0f} % of its weights are in the lowest bin"
                    for tensor, counts in of.items())  # fmt: skip
    frame = layout(name, "share of a tensor's weights")
    frame["yaxis"] |= {"type": "log"}
    return figure(name, f"{name.capitalize()} of each weight", f"{alt}.", [view(traces, frame)])


def clients(local: Sequence[float], dense: Sequence[float]) -> Figure:
    """Return the figure of the scores of single clients, of the pruned and of the dense run."""
    given = [(name, values) for name, values in (("pruned", local), ("dense FedAvg", dense)) if values]
    if not given:
        return {}
    traces = [
        {"type": "box", "name": name, "y": list(values), "boxpoints": "all", "jitter": 0.4, "pointpos": 0,
         "marker": {"color": colour(n), "size": 4}}
        for n, (name, values) in enumerate(given)
    ]  # fmt: skip
    alt = "; ".join(
        f"{name}: from {min(v):.3g} to {max(v):.3g}, median {statistics.median(v):.3g}" for name, v in given
    )
    views = [view(traces, layout("", "on each client's own test rows"))]
    return figure("clients", "Client by client", f"{alt}.", views)


def mask(name: str, rows: Sequence[Sequence[int]]) -> Figure:
    """Return the figure of a layer's mask, with a row for each filter; kept weights are dark."""
    if not rows:
        return {}
    kept = sum(map(sum, rows)) / max(1, sum(map(len, rows)))
    trace = {
        "type": "heatmap", "z": [list(row) for row in rows], "showscale": False, "zmin": 0, "zmax": 1,
        "colorscale": [[0, "#E8E8E8"], [1, "#0072B2"]], "hovertemplate": "filter %{y}, input %{x}<extra></extra>",
    }  # fmt: skip
    frame = layout("inputs and kernel positions", "filters")
    frame["yaxis"] |= {"autorange": "reversed"}
    alt = f"{name}: {len(rows)} filters of {len(rows[0])} weights are drawn, {100 * kept:.1f} % of them kept."
    return figure("mask", f"The mask of {name}", alt, [view([trace], frame)])


def _carried(row: Mapping[str, Any]) -> int:
    return int(row["bytes_down"]) + int(row["bytes_up"])
