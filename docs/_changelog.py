"""A hook of mkdocs: the page of changes is the repository's CHANGELOG.md, with its links as the site's."""

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the text of CHANGELOG.md for the page ``changelog.md``, and any other page as it is."""
    del files
    if page.file.src_uri != "changelog.md":
        return markdown
    text = (Path(config.config_file_path).parent / "CHANGELOG.md").read_text("utf-8")
    return text.replace("](docs/", "](")
