"""What the terminal shows."""

import io

from rich.console import Console

from secateur.report.formatting import amount, size
from secateur.report.terminal import Display, comparison


def event(phase="train", round_=1, **more):
    return {
        "event": "row", "phase": phase, "round": round_, "bytes_down": 1000, "bytes_up": 500, "sparsity": 0.25,
        "left_out": [],
    } | more  # fmt: skip


def shown(*, terminal, events, rounds=20):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Display(console) as display:
        watch = display.watch("autoflip", rounds)
        for each in events:
            watch(each)
    return out.getvalue()


def test_plain_lines_for_every_tenth_of_the_rounds():
    events = [event("explore", 0), *(event(round_=t, accuracy=0.5) for t in range(1, 21))]
    lines = shown(terminal=False, events=events).splitlines()
    assert lines[0] == "autoflip explore: sparsity 0.25 1.5 kB"
    assert lines[1] == "autoflip round 2/20: accuracy 0.500 sparsity 0.25 4.5 kB"
    assert len([line for line in lines if "round" in line]) == 10


def test_live_display_shows_phases_rounds_and_time_left():
    reply = {"event": "reply", "phase": "explore", "round": 0, "done": 3, "total": 12}
    text = shown(terminal=True, events=[reply, reply | {"phase": "train"}, event(round_=4, mae=2.5)])
    for words in ("explore", "3/12", "4/20", "MAE 2.500", "left"):
        assert words in text


def test_who_was_left_out_is_said():
    left = [{"client": 7, "reason": "payload is damaged"}]
    assert "client 7 left out: payload is damaged" in shown(terminal=False, events=[event(left_out=left)])


def test_the_words_of_a_client_are_shown_as_they_are():
    left = [{"client": 7, "reason": "ValueError: [/bold] of [red]"}]
    assert "left out: ValueError: [/bold] of [red]" in shown(terminal=False, events=[event(left_out=left)])


def summary(method, **phases):
    costs = {"bytes_down": 2e6, "bytes_up": 1e6, "client_seconds": 1.5, "train_macs": 3e9, "train_macs_physical": 4e9}
    final = {
        "accuracy": 0.9,
        "local": [0.5, 0.7, 0.9],
        "sparsity": 0.3,
        "sparsity_all": 0.29,
        "macs": 7e4,
        "macs_physical": 8e4,
        "evaluate_bytes": 1e5,
    }
    return {"method": method, "study": "abcd1234", "phases": dict.fromkeys(["train", *phases], costs), "final": final}


def test_the_table_has_ratios_and_exploration_on_its_own_line():
    out = io.StringIO()
    Console(file=out, width=120).print(comparison(summary("autoflip", explore=1), summary("fedavg")))
    text = out.getvalue()
    line = next(row for row in text.splitlines() if "bytes down, total" in row)
    assert "4 MB" in line
    assert "2.000" in line
    assert "bytes up, explore" in text
    assert "local accuracy, worst tenth" in text
    alone = io.StringIO()
    regression = summary("x")
    regression["final"] |= {"mae": 3.0, "local": []}
    del regression["final"]["accuracy"]
    Console(file=alone, width=120).print(comparison(regression, None))
    assert "mae on the server" in alone.getvalue()
    assert "ratio" not in alone.getvalue()


def cells(final):
    """Return the closing table as text by label."""
    out = io.StringIO()
    made = summary("x")
    made["final"] = {k: v for k, v in made["final"].items() if k not in {"accuracy", "local"}} | final
    Console(file=out, width=120).print(comparison(made, None))
    rows = [row.split("│")[1:3] for row in out.getvalue().splitlines() if row.count("│") == 3]
    return {label.strip(): shown.strip() for label, shown in rows}


def test_the_worst_tenth_of_errors_is_the_largest():
    """Twenty clients with errors 1 to 20: the tenth that fares worst has 19 and 20."""
    errors = [float(n) for n in range(1, 21)]
    assert cells({"mae": 9.0, "local": errors})["local mae, worst tenth"] == "19.5000"
    shares = [n / 20 for n in range(1, 21)]
    assert cells({"accuracy": 0.5, "local": shares})["local accuracy, worst tenth"] == "0.0750"


def test_the_table_says_which_rows_are_for_choosing_and_which_for_telling():
    table = cells({"accuracy": 0.9, "validation": 0.8, "local": []})
    assert table["accuracy on the server's test set"] == "0.9000"
    assert table["accuracy on validation rows, to choose by"] == "0.8000"
    personal = cells({"accuracy": 0.9, "validation": 0.8, "local": [0.9], "central": False})
    assert personal["accuracy on clients' test rows"] == "0.9000"
    assert not any("validation" in label for label in cells({"accuracy": 0.9, "local": []}))


def test_units():
    assert [size(x) for x in (999, 1000, 1234567, 5e9, 7e12)] == ["999 B", "1 kB", "1.23 MB", "5 GB", "7 TB"]
    assert [amount(x) for x in (12, 7120000, 3e9, 8e13)] == ["12", "7.12 M", "3 G", "80 T"]
