"""The client's side of secateur's app on Flower: what a node says of itself, and how it serves requests.

What the node's owner says (``site``) is looked at before anything of a run is imported, opened or computed. Whatever
goes wrong is one line in the node's own log; the server is told a code (``codes``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from secateur.data import Source
from secateur.data.shards import Shards, open_shards
from secateur.errors import ConfigError, DataError
from secateur.federation import agreement, prepare, trial
from secateur.federation.client import Participant
from secateur.flower import bases, codes, keys, limits, policy, tables
from secateur.flower.asked import About, Answer, Asked, Node
from secateur.flower.codes import RefusedError
from secateur.flower.greeting import about_this, facts_of
from secateur.flower.limits import Meter
from secateur.flower.memory import Memory, cache
from secateur.flower.messages import HELLO, LOG
from secateur.flower.settings import settings_of
from secateur.flower.site import Most, Site
from secateur.learning.work import alone
from secateur.streams import kept_globals
from secateur.study.study import Study, parse_study
from secateur.wire.codec import scalars_in

_SHOWN = 8  # settings that a refusal names
_LONGEST = 300  # characters of a setting in it


def answer(asked: Asked) -> Answer:
    """Return a node's answer to a message, made within what the node's owner lets it cost; of a failure it says a code.

    What the node keeps is changed in ``asked.node``.
    """
    make = _introduce if asked.kind == HELLO else _serve
    try:
        return limits.limited(asked.node.config, lambda site: make(asked, site))
    except (Exception, SystemExit) as broken:  # noqa: BLE001 -- logged here; the server leaves this client out
        _participant.cache_clear()  # its model may have been left anywhere
        return Answer(codes.refused(broken))


def _introduce(asked: Asked, site: Site) -> Answer:
    """Return what a node says of itself, after a trial of its first steps; see ``federation.trial``.

    A node with a table tries them when it is sent the schema, by which its rows are made.
    """
    node, facts = asked.node, asked.about
    client, study, source = _place(node, site)
    said: About = {"client": client, "own": site.data is not None, **about_this()}
    if site.folder is not None:
        said |= keys.proof(site.folder, str(facts.get("challenge", ""))[:64], node.id, client)
    if source is not None and source.table is not None:
        return Answer({**said, tables.HOLDS: tables.holds(node, site, str(facts.get("schema", "")))})
    rows = _shards(site, client, study)
    for remark in rows.meta.remarks:
        LOG.info("%s", remark)
    participant = _participant(study.model_dump_json(), rows, client, site.most)
    trial.check(participant, (client,))
    return Answer({**said, **facts_of(participant)})


def _place(node: Node, site: Site) -> tuple[int, Study, Source | None]:
    """Return the number of this node's client, its study, and its own data, if it has any."""
    study = _permitted(node, site)
    number = node.config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < study.data.clients:
        told = f"partition-id = {str(number)[:20]}"
        raise RefusedError("client", f"{told}, and clients are 0 to {study.data.clients - 1}", told)
    if site.data is None:
        return number, study, None
    with _unsaid(number):
        return number, study, prepare.own_source(study, number, site.data)


@contextlib.contextmanager
def _unsaid(client: int) -> Iterator[None]:
    """Keep what is wrong with a node's own data to its own log: it may say what a cell holds, or where it lies."""
    try:
        yield
    except (DataError, ConfigError) as broken:
        raise RefusedError("data", f"client {client}: {broken}") from broken


def _shards(site: Site, client: int, study: Study) -> Shards:
    """Return the rows of a node that are not made by a schema."""
    if site.data is None:
        return _opened(prepare.simulated(study, cache()))
    with _unsaid(client):
        return prepare.own(study, client, site.data)


def _permitted(node: Node, site: Site) -> Study:
    """Return the study of a run, after checking that it names nothing that the node's owner has not allowed.

    Raises:
        RefusedError: it names such a thing, or its settings are too long.
        ConfigError: they are wrong.
    """
    limits.check_settings(node.settings)
    values = settings_of(node.settings)
    wrong = policy.refused(values, site.owners, own=site.data is not None, only=site.only)
    names = [f"{path}={value}"[:_LONGEST] for path, value in wrong]
    if names:
        shown = ", ".join(map(repr, names[:_SHOWN]))
        raise RefusedError(
            "allow",
            f"not allowed here: {shown}. Of itself a node takes what is secateur's own and its owner has not left out, "
            "and opens its own data folder only; name what else you trust in --node-config "
            f"'allow=\"PATH=VALUE ...\"', in {policy.FILE}, or in the environment's {policy.ENVIRONMENT}",
            names[0],
        )
    return parse_study(values)


def _serve(asked: Asked, site: Site) -> Answer:
    node, about, request = asked.node, asked.about, asked.payload
    limits.check_most("bytes", len(request or b""), site.most.bytes)
    client, study, source = _place(node, site)
    if request is None or about.get("client") != client:
        raise RefusedError("request", f"a request for client {str(about.get('client'))[:20]} came to client {client}")
    if source is None or source.table is None:
        rows = _shards(site, client, study)
    elif not about.get("schema"):
        site.answering(agreement.PHASE)
        with _unsaid(client):
            return Answer({"lost": False}, tables.answer(node, site, study, client, request))
    elif (made := tables.rows(node, site, study, client, str(about["schema"]))) is not None:
        rows = made
    else:
        return Answer({tables.LACKS: True})
    site.answering(str(scalars_in(request).get("phase")))
    memory = Memory(node, site, str(about.get("run")), client)
    wanted = str(about.get("kept", ""))
    state = memory.get(wanted)
    participant = _participant(study.model_dump_json(), rows, client, site.most)
    participant.kept = bases.kept(node, site)
    participant.alone = Meter(site.most, functools.partial(alone, compute=study.compute))
    with kept_globals():
        reply, kept = participant(client, request, state)
    said: About = {"lost": bool(wanted) and state is None}
    if kept is not None:
        said["kept"] = memory.put(kept, after=wanted)
    return Answer(said, reply)


@functools.lru_cache(maxsize=1)
def _participant(study: str, rows: Shards, client: int, most: Most) -> Participant:
    # one torch thread: the split of a reduction over threads would change its last bits
    torch.set_num_threads(1)
    return limits.participant(Study.model_validate_json(study), rows, client, most)


@functools.lru_cache(maxsize=1)
def _opened(folder: Path) -> Shards:
    return open_shards(folder)
