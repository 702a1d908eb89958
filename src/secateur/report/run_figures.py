"""Figures of a single run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.learning.metrics import Metric
from secateur.report.drawing import BYTES, Figure, colour, counted, dash, figure, layout, view
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
            "y": [100 - 100 * row["layers"].get(name, sizes[name]) / sizes[name] for row in trained],
            "line": {"color": colour(n), "dash": dash(n)},
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    alt = "; ".join(f"{trace['name']} ends at {trace['y'][-1]:.1f} %" for trace in traces)
    frame = layout("rounds", "sparsity %")
    frame["xaxis"] |= counted(trained[-1]["round"])
    caption = "The share of each tensor's weights that is removed."
    return figure("layers", "Sparsity of each layer", f"{alt}.", [view(traces, frame)], caption=caption)


def traffic(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of the bytes of each exchange, by direction and part."""
    parts = [(way, part) for way in ("down", "up") for part in dict.fromkeys(p for row in rows for p in row[way])]
    labels = [f"{row['phase'] if row['phase'] != 'train' else ''} {row['round']}".strip() for row in rows]
    traces = [
        {
            "type": "bar", "name": f"{way}, {part}", "x": list(range(1, len(rows) + 1)), "text": labels,
            "textposition": "none", "y": [row[way].get(part, 0) for row in rows], "marker": {"color": colour(n)},
        }
        for n, (way, part) in enumerate(parts)
        if any(row[way].get(part) for row in rows)
    ]  # fmt: skip
    total = sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    frame = {**_exchanges(len(rows)), "barmode": "stack"}
    alt = f"{len(rows)} exchanges carried {size(total)}: the first {size(_carried(rows[0]))}, the last "
    alt += f"{size(_carried(rows[-1]))}."
    caption = "Down is from the server to clients. Point at a bar for its phase and round."
    return figure("traffic", "Bytes of each exchange", alt, [view(traces, frame)], caption=caption)


def _exchanges(count: int) -> Figure:
    """Return a layout of bytes by exchange, which are counted from 1."""
    frame = layout("exchanges", "bytes")
    frame["xaxis"] |= counted(count)
    frame["yaxis"] |= BYTES
    return frame


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
            "type": "scatter", "mode": "lines", "name": name, "x": list(range(1, len(rows) + 1)), "y": carried,
            "line": {"color": colour(n), "dash": dash(n)},
        }
        for n, (name, carried) in enumerate(tiers.items())
    ]  # fmt: skip
    sent = [row["relayed"] for row in rows if "relayed" in row]
    alt = "; ".join(f"{name}: {size(sum(carried))}" for name, carried in tiers.items())
    alt += f"; relays sent {sum(one['sums'] for one in sent)} sums and {sum(one['single'] for one in sent)} replies."
    return figure("relayed", "Bytes by tier", alt, [view(traces, _exchanges(len(rows)))])


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
                "name": tensor, "x": middles, "y": [100 * count / total for count in counts],
            }
        )  # fmt: skip
    alt = "; ".join(f"{tensor}: {100 * counts[0] / max(1, sum(counts)):.0f} % of its weights are in the lowest bin"
                    for tensor, counts in of.items())  # fmt: skip
    frame = layout(name, "share of a tensor's weights %")
    frame["yaxis"] |= {"type": "log", "dtick": 1}
    caption = "How the value is spread over each tensor's weights."
    return figure(name, f"{name.capitalize()} of each weight", f"{alt}.", [view(traces, frame)], caption=caption)


def clients(local: Sequence[float], dense: Sequence[float], metric: Metric) -> Figure:
    """Return the figure of the scores of single clients, of the pruned and of the dense run."""
    given = [(name, values) for name, values in (("pruned", local), ("dense FedAvg", dense)) if values]
    if not given:
        return {}
    by, unit = (100.0, " %") if metric.share else (1.0, "")
    traces = [
        {"type": "box", "name": name, "y": [by * value for value in values], "boxpoints": "all", "jitter": 0.4,
         "pointpos": 0, "marker": {"color": colour(n), "size": 4}, "showlegend": False}
        for n, (name, values) in enumerate(given)
    ]  # fmt: skip
    alt = "; ".join(
        f"{name}: from {metric.text(min(v))} to {metric.text(max(v))}, median {metric.text(statistics.median(v))}"
        for name, v in given
    )
    views = [view(traces, layout("", f"{metric.worded}{unit}"))]
    return figure("clients", "Client by client", f"{alt}.", views, caption="Each on its own test rows.")


def mask(name: str, rows: Sequence[Sequence[int]]) -> Figure:
    """Return the figure of a layer's mask, with a row for each filter; kept weights are dark."""
    if not rows:
        return {}
    kept = sum(map(sum, rows)) / max(1, sum(map(len, rows)))
    trace = {
        "type": "heatmap", "z": [list(row) for row in rows], "showscale": False, "zmin": 0, "zmax": 1,
        "colorscale": [[0, "#E8E8E8"], [1, "#0077BB"]], "hovertemplate": "filter %{y}, input %{x}<extra></extra>",
    }  # fmt: skip
    frame = layout("inputs and kernel positions", "filters")
    frame["yaxis"] |= {"autorange": "reversed"} | counted(len(rows))
    frame["xaxis"] |= counted(len(rows[0]))
    alt = f"{name}: {len(rows)} filters of {len(rows[0])} weights are drawn, {100 * kept:.1f} % of them kept."
    caption = "Kept weights are blue; a grey row is a filter that is gone."
    return figure("mask", f"The mask of {name}", alt, [view([trace], frame)], caption=caption)


def _carried(row: Mapping[str, Any]) -> int:
    return int(row["bytes_down"]) + int(row["bytes_up"])
