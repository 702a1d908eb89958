"""A hook of mkdocs: pages that are files of the repository's root, with their links as the site's."""

from pathlib import Path
from typing import Any

PAGES = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page: of a file of the root its text, of any other its own, with links to such files as the site's."""
    del files
    name = page.file.src_uri
    if name in PAGES:
        text = (Path(config.config_file_path).parent / PAGES[name]).read_text("utf-8")
        return text.replace("](docs/", "](")
    for there, root in PAGES.items():
        markdown = markdown.replace(f"](../{root}", f"]({there}")
    return markdown
