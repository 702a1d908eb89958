"""secateur's two apps; what they do is in the run configuration of pyproject.toml."""

from secateur.flower import client_app, server_app

server = server_app()
client = client_app()
