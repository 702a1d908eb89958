"""Throw mutated words at what reads a node's greeting and failures, an owner's policy, and a run's settings.

    python benchmarks/fuzz_wire.py --payloads 700000 --said 300000

Each must come out as a bounded value, or as the one error that its reader promises. ``fuzz_wire.py`` calls it; whatever
else happens is printed and ends the run with 1.
"""

from __future__ import annotations

import collections
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError, SecateurError
from secateur.flower import codes, limits, policy
from secateur.flower.codes import RefusedError
from secateur.flower.greeting import Greeting, GreetingError, about_this, read
from secateur.flower.settings import settings_of
from secateur.flower.site import site_of
from secateur.study.study import parse_study

LONGEST = 1_000  # characters of any error about what a node says

GREETINGS: tuple[dict[str, Any], ...] = (
    {"client": 3, "own": True, **about_this(), "holds": False, "key": "ab" * 32, "proof": "cd" * 64},
    {
        "client": 0, "own": False, **about_this(), "inputs": [1, 28, 28], "outputs": 10, "kind": "image",
        "scale": 255.0, "task": "classification", "model": "0123456789abcdef", "classes": "",
    },
)  # fmt: skip
FAILURES: tuple[dict[str, Any], ...] = tuple({"error": code, "detail": "epochs 3"} for code in codes.CODES)
POLICY = """
data = "/data"
state = "/state"
base = "own"
sources = ["table", "arrays"]
methods = ["fedavg"]
models = ["mlp"]
allow = ["model.name=my_models:net"]
answers = ["train", "evaluate"]

[most]
epochs = 3
rows = 500
seconds = 60.5
bytes = 100_000
parameters = 5_000
"""
SETTINGS: dict[str, Any] = {
    "method": "fedavg", "rounds": 2, "data.clients": 2, "data.source": "table", "data.target": "14>0", "attack": "",
    "data.partition": "iid", "model.name": "mlp", "model.options.hidden": "[4]", "training.epochs": 1, "wait": 0.2,
    "set": "aggregator=mean training.lr=0.1", "guards.bounds.rows": 3,
}  # fmt: skip
WORDS = (
    "", "\n", "\x00", "\x1b[2J", "\u202e", "\ud800", "../../etc", "trap_module", "trap_module:net", "a.b.c", "[/red]",
    "x" * 300, "{0.__class__}", "%s", "'", '"', "=", "nan", "-1", "1e999", "[" * 200, "é", "0x10", "true",
)  # fmt: skip


def value(draw: random.Random) -> Any:
    """Return any value that Flower carries, and some that it does not."""
    some: tuple[Callable[[], Any], ...] = (
        lambda: draw.choice((0, -1, 1, 2**20, 2**31, 2**63 - 1, -(2**63), 10**30, draw.randrange(-100, 100))),
        lambda: draw.choice((0.0, -1.5, float("nan"), float("inf"), 1e308, draw.random())),
        lambda: draw.random() < 0.5,
        lambda: draw.randbytes(draw.randrange(40)),
        lambda: [value(draw) for _ in range(draw.choice((0, 1, 3, 9)))] if draw.random() < 0.9 else [1] * 10_000,
        lambda: draw.choice((None, {}, {"a": 1}, (1, 2))),
        lambda: draw.choice(WORDS) * draw.choice((1, 1, 2, 300)),
        lambda: word(draw, draw.choice(WORDS)),
    )
    return draw.choice(some)()


def word(draw: random.Random, text: str) -> str:
    """Return a text with one to three letters that are others, more, or gone."""
    letters = list(text)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(letters) + 1)
        letters[at : at + draw.randrange(2)] = draw.choice((chr(draw.randrange(1, 0x3000)), draw.choice(WORDS), ""))
    return "".join(letters)


def mutated(draw: random.Random, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with one to four of them others, more, or gone."""
    made = dict(facts)
    for _ in range(draw.randrange(1, 5)):
        name = draw.choice(list(made) or ["client"])
        match draw.randrange(5):
            case 0:
                made.pop(name, None)
            case 1:
                made[draw.choice((word(draw, name), draw.choice(WORDS)))] = value(draw)
            case 2 if isinstance(made.get(name), str):
                made[name] = word(draw, made[name])
            case 3 if draw.random() < 0.05:
                made |= {f"{name}{k}": k for k in range(2_000)}
            case _:
                made[name] = value(draw)
    return made


def printable(text: str) -> None:
    """Refuse an error's text that is long, or no line that can be printed anywhere.

    Raises:
        AssertionError: it is.
    """
    if not text.isprintable() or len(text) > LONGEST:
        raise AssertionError(f"an error of {len(text)} characters: {text[:200]!r}")


def greeting(draw: random.Random) -> str:
    """Read a greeting."""
    try:
        said = read(mutated(draw, draw.choice(GREETINGS)))
    except GreetingError as wrong:
        printable(str(wrong))
        return "refused"
    rows = said.rows
    sound = type(said.client) is int and 0 <= said.client < 10**6 and len(said.key) <= 128 and type(said.own) is bool
    if rows is not None:
        sound &= len(rows.inputs) <= 8 and all(type(n) is int and 0 < n <= 2**20 for n in (*rows.inputs, rows.outputs))
        sound &= 0 < rows.scale < float("inf") and len(rows.task) <= 200 and len(rows.model) == 16
    if not isinstance(said, Greeting) or not sound:
        raise AssertionError(f"a greeting was let through: {said!r}")
    return "read"


def failure(draw: random.Random) -> str:
    """Read what a node says of a failure."""
    said = mutated(draw, draw.choice(FAILURES))
    told = codes.heard(said)
    printable(told)
    if bool(told) != ("error" in said):
        raise AssertionError(f"{said!r} was heard as {told!r}")
    known = isinstance(said.get("error"), str) and said["error"] in codes.CODES
    return "read" if known else "refused"


def owners(draw: random.Random, folder: Path) -> str:
    """Read an owner's policy, from a file or from a node's configuration."""
    try:
        if draw.random() < 0.5:
            path = folder / "policy.toml"
            path.write_bytes(word(draw, POLICY).encode(errors="surrogatepass"))
            site = site_of({"policy": str(path)}, {})
        else:
            given = {"data": "", "methods": "fedavg mlp", "most.epochs": 3, "answers": "train", "allow": "method=a"}
            site = site_of(mutated(draw, given), {})
    except RefusedError as wrong:
        if wrong.code != "policy" or "\n" in str(wrong):
            raise AssertionError(f"a policy was refused as {wrong.code}: {wrong}") from wrong
        return "refused"
    if site.most.epochs < 1 or not 0 < site.most.seconds < float("inf"):
        raise AssertionError(f"a policy was let through: {site!r}")
    return "read"


def settings(draw: random.Random) -> str:
    """Read a run's settings as a node does, and see that nothing of anyone's is imported."""
    given = mutated(draw, SETTINGS)
    try:
        limits.check_settings(given)
        values = settings_of(given)
        refused = policy.refused(values, (), own=True)
        if not refused:
            parse_study(values)
    except (ConfigError, RefusedError) as wrong:
        codes.said(wrong)
        return "refused"
    except SecateurError:
        return "refused"
    finally:
        if any(name.startswith("trap_") for name in sys.modules):
            raise AssertionError("a module that a run named was imported")
    return "refused" if refused else "read"


def fuzz(count: int, seed: int, guard: Callable[[], Any] = lambda: None) -> collections.Counter[str]:
    """Read so many mutated words; return how many of each kind were read and refused.

    Args:
        count: how many.
        seed: of the draws.
        guard: called before each, to begin its time.

    Raises:
        SystemExit: one of them did something else; it is printed.
    """
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        readers: dict[str, Callable[[random.Random], str]] = {
            "greeting": greeting, "failure": failure, "policy": lambda draw: owners(draw, Path(name)),
            "settings": settings,
        }  # fmt: skip
        turns = ["greeting", "failure"] * 4 + ["policy", "settings"]  # what a stranger says is read most often
        for n in range(count):
            guard()
            kind = turns[n % len(turns)]
            try:
                outcome = readers[kind](random.Random(f"{seed}/{n}"))
            except Exception as wrong:
                print(f"{kind} {n} of seed {seed}: {wrong!r}", file=sys.stderr)
                raise SystemExit(1) from wrong
            found[f"{kind} {outcome}"] += 1
            if (n + 1) % 10_000 == 0:
                print(f"{n + 1} words, {dict(found)}", flush=True)
    return found
