"""Tables in terminals of any width: words and figures stay whole, and what has no room is told."""

import io

import pytest
from rich.console import Console

from secateur.report.fitted import Fitted

ROWS = [
    {"method": "FedSparsify 80 %", "accuracy": "92.5 ± 0.3", "to dense": "-0.8 ± 0.4", "bytes": "12.3 MB"},
    {"method": "one-shot magnitude", "accuracy": "91.1 ± 0.4", "to dense": "", "bytes": "1.2 MB"},
]
TABLE = Fitted("iid, 3 seeds", ROWS, drop=("bytes", "to dense"), caption="Quality: as said.")


def shown(table, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize(
    ("width", "gone"),
    # with their lines, columns of 18, 10, 10 and 7 take 58; the first may shrink to 16, "to dense" stands whole
    [(160, []), (58, []), (56, []), (55, ["bytes"]), (46, ["bytes"]), (45, ["bytes", "to dense"])],
)
def test_columns_go_in_their_order_and_are_told(width, gone):
    lines = shown(TABLE, width)
    heading = next(line for line in lines if "method" in line)
    assert [name for name in ("bytes", "to dense") if name not in heading] == gone
    assert [line for line in lines if line.startswith("No room for")] == (
        [f"No room for: {', '.join(gone)}"] if gone else []
    )
    assert "Quality: as said." in lines


@pytest.mark.parametrize("width", [31, 45, 60, 80, 160])
def test_no_word_and_no_figure_is_broken(width):
    text = "\n".join(shown(TABLE, width))
    for whole in ("FedSparsify", "one-shot", "magnitude", "92.5 ± 0.3", "91.1 ± 0.4"):
        assert whole in text


def test_where_nothing_more_can_go_rows_stand_below_one_another():
    assert shown(TABLE, 25) == [
        "iid, 3 seeds",
        "FedSparsify 80 %", "  accuracy: 92.5 ± 0.3", "  to dense: -0.8 ± 0.4", "  bytes: 12.3 MB",
        "one-shot magnitude", "  accuracy: 91.1 ± 0.4", "  bytes: 1.2 MB",
        "Quality: as said.",
    ]  # fmt: skip


def test_sentences_are_broken_between_words_and_markup_is_text():
    rows = [{"name": "mean", "what it is": "the mean of [bold]all clients[/bold], weighted by their rows"}]
    lines = shown(Fitted("", rows, words=("what it is",)), 40)
    assert "[bold]all" in "\n".join(lines)
    assert len([line for line in lines if line.startswith("│")]) > 1
