"""What the terminal shows."""

import io

from rich.console import Console

from secateur.report.formatting import amount, size
from secateur.report.terminal import Display, comparison, failure


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


def test_clients_that_were_left_out_for_one_reason_are_one_line():
    left = [{"client": k, "reason": f"it has {k} rows"} for k in (3, 5, 8)] + [{"client": 9, "reason": "silent"}]
    lines = shown(terminal=False, events=[event(left_out=left, below_quorum=7)]).splitlines()
    assert lines[-3:] == [
        "autoflip round 1: 3 clients (3, 5, 8) left out: it has 3 rows",
        "autoflip round 1: client 9 left out: silent",
        "autoflip round 1: fewer replies counted than the 7 needed: nothing is learnt from it",
    ]


def test_a_layer_that_is_emptied_is_told_once():
    rounds = [event(round_=t, emptied=["fc1.weight"] if t > 1 else []) for t in range(1, 5)]
    text = shown(terminal=False, events=[*rounds, event(round_=5, emptied=["fc1.weight", "fc2.weight"])])
    assert [line for line in text.splitlines() if "no weight left" in line] == [
        "autoflip round 2: fc1.weight has no weight left: nothing of its input comes through",
        "autoflip round 5: fc2.weight has no weight left: nothing of its input comes through",
    ]
    out = io.StringIO()
    made = summary("x") | {"reasons": [{"reason": "silent [b]", "requests": 4, "clients": [1, 2]}]}
    made["final"]["emptied"] = ["fc1.weight"]
    Console(file=out, width=120).print(comparison(made, None))
    text = " ".join(out.getvalue().split())
    assert "fc1.weight has no weight left" in text
    assert "2 clients (1, 2) left out of 4 exchanges: silent [b]" in text


def test_a_run_without_a_result_is_headed_by_what_happened():
    made = summary("x") | {"failed": "no reply of [any] client counted", "final": {}}
    made["reasons"] = [{"reason": "silent", "requests": 9, "clients": [1, 2, 3]}]
    out = io.StringIO()
    Console(file=out, width=120).print(failure(made))
    lines = out.getvalue().splitlines()
    assert lines[0] == "x, study abcd1234: no result: no reply of [any] client counted"
    assert any("3 clients (1, 2, 3) left out of 9 exchanges: silent" in line for line in lines)
    assert any("bytes down, total" in line and "2 MB" in line for line in lines)
    assert "accuracy" not in out.getvalue()
    made["phases"] = {}
    out = io.StringIO()
    Console(file=out, width=120).print(failure(made))
    assert len(out.getvalue().splitlines()) == 1


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
