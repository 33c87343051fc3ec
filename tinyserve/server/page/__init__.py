"""The page at /: one HTML document without external resources, assembled from this folder's files."""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = ("basics.js", "server.js", "conversation.js", "glass_box.js", "panel.js", "people.js")  # in this order


@cache
def page() -> str:
    """The HTML, with its one style and its one script inside."""
    style, *scripts = ((FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", *SCRIPTS))
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    html = html.replace("<style>\n", f"<style>\n{style}")
    return html.replace("<script>\n", "<script>\n" + "".join(scripts))
