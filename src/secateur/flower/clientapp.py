"""secateur's apps on Flower, as its processes load them: torch is imported where a message or a run needs it."""

from __future__ import annotations

from secateur.flower import resident
from secateur.flower.asked import Answer, Asked
from secateur.flower.messages import (
    HELLO,
    LOG,
    SERVE,
    ClientApp,
    Context,
    Grid,
    Message,
    ServerApp,
    asked_by,
    reply,
)


def client_app() -> ClientApp:
    """Return a ClientApp that serves the study of its run configuration; see ``node`` and ``resident``."""
    app = ClientApp()

    def serve(message: Message, context: Context) -> Message:
        asked = asked_by(message, context)
        return reply(message, context, asked, _answer(asked))

    app.query(HELLO.partition(".")[2])(serve)
    app.train(SERVE.partition(".")[2])(serve)
    return app


def _answer(asked: Asked) -> Answer:
    if resident.wanted(asked):
        try:
            return resident.answered(asked)
        except resident.UnavailableError as broken:
            LOG.info("%s; this process does the work itself", broken)
    from secateur.flower import node  # noqa: PLC0415 -- torch comes with it

    return node.answer(asked)


def server_app() -> ServerApp:
    """Return a ServerApp that runs the study of its run configuration into the folder ``out``; see ``apps.main``."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        from secateur.flower import apps  # noqa: PLC0415 -- torch comes with it

        apps.main(grid, context)

    return app
