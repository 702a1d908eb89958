"""Sections of a Study: the data, and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.pruning.discovery import How
from secateur.study.options import Option
from secateur.study.usual import SOURCE


class Section(BaseModel):
    """Base of what is validated when it is made, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(Section):
    """The data, and how it is split between clients.

    Attributes:
        source: ``digits``, ``idx:FOLDER``, ``cifar10:FOLDER``, ``text:FILE`` or ``hub:NAME``; see ``secateur list``.
        clients: K, the number of clients; 0, the default of ``natural``: as many as there are natural ids.
        partition: ``iid``, ``dirichlet:ALPHA``, ``pathological:CLASSES`` or ``natural``.
        test_fraction: share of each client's rows held out as its local test split.
        validation_fraction: share of each client's rows held out for choosing a setting, an epoch or a round; reported
            figures are of test rows. 0: none.
        public: number of training rows that only the server has, drawn before the partition; for methods whose server
            trains.
        task: what is learnt, where that is not what the data says of itself: ``classification``, ``regression``, or
            ``module:Class`` of your own (``learning.task``).
        target: the column of a table that is learnt, where ``source`` does not name it.
        site: the column of a table that says which site a row is of.
        options: how the source is to be read, as its format takes it: ``delimiter`` or ``drop`` of a table, ``size`` of
            images.
    """

    source: str = SOURCE
    clients: int = Field(default=20, ge=0, le=1_000_000)
    partition: str = "pathological:2"
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    public: int = Field(default=0, ge=0)
    task: str = ""
    target: str = ""
    site: str = ""
    options: dict[str, Option | tuple[str, ...]] = Field(default_factory=dict)

    @property
    def reading(self) -> dict[str, Option | tuple[str, ...]]:
        """Return what the source's loader is told: the options, and the names of columns that are given."""
        named = {name: value for name, value in (("target", self.target), ("site", self.site)) if value}
        return {**self.options, **named}

    @model_validator(mode="before")
    @classmethod
    def _all_sites(cls, values: Any) -> Any:
        """Let there be as many clients as natural ids if the study does not say how many."""
        natural = isinstance(values, Mapping) and values.get("partition") == "natural"
        return {"clients": 0, **values} if natural else values

    @model_validator(mode="after")
    def _some_clients(self) -> Self:
        """Refuse no clients where nothing else says how many there are."""
        if not self.clients and self.partition != "natural":
            raise ValueError("data.clients = 0 must be at least 1, unless data.partition = natural")
        return self


class ModelSection(Section):
    """The model.

    Attributes:
        name: a name of ``secateur list``, or ``module:factory``.
        init: the distribution of initial weights; see ``models.initialise``.
        structure: how removable units are found: ``trace`` follows what the model calls, ``torch_pruning`` uses that
            package's dependency graph (an extra that every client needs), ``both`` the graph where the trace finds
            none; ``none`` finds no units.
        options: keyword arguments of the factory.
    """

    name: str = "smallcnn"
    init: Literal["xavier_normal", "xavier_uniform", "kaiming_normal", "torch"] = "xavier_normal"
    structure: How = "trace"
    options: dict[str, Option | tuple[int, ...]] = Field(default_factory=dict)
