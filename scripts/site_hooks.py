"""What mkdocs needs beside the pages of docs/: files that these link to, as pages of the site, which then reads alone.

Pages link to sources as GitHub has them (../tinyserve/llm.py). In the site each of these is a page under source/ with
the file's text; pages at the top of the repository (CHANGELOG.md) are under project/.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yml": "yaml", ".js": "javascript", ".html": "html"}


def outside(page: str, target: str) -> str | None:
    """The path within the repository that a link of a page of docs/ leads to, if that is no page of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target.replace("\\_", "_")))
    return None if path.startswith(("docs/", "..")) or not (ROOT / path).exists() else path


def page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    return f"project/{path}" if path.endswith(".md") and "/" not in path else f"source/{path}.md"


def text_of(path: str) -> str:
    """The page for a file, or for a folder, which is a list of its files."""
    file = ROOT / path
    if path.endswith(".md"):
        return file.read_text(encoding="utf-8")
    if file.is_dir():
        rows = sorted(one.name for one in file.iterdir() if one.is_file() and not one.name.startswith("."))
        return f"# {path}/\n\n" + "\n".join(f"- `{name}`" for name in rows) + "\n"
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {path}\n\n``````{language}\n{file.read_text(encoding='utf-8')}\n``````\n"


def linked(text: str, page: str) -> str:
    """Links to files of the repository, to where the site has them."""

    def replaced(match: re.Match[str]) -> str:
        path = outside(page, match["target"])
        if path is None:
            return match[0]
        target = posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
        return f"]({target}{match['anchor'] or ''})"

    return LINK.sub(replaced, text)


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file that a page links to, and for those that such a page links to."""
    left = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while left:
        page, text = left.pop()
        for match in LINK.finditer(text):
            path = outside(page, match["target"])
            if path is None or files.get_file_from_path(page_of(path)) is not None:
                continue
            content = text_of(path)
            if path.endswith(".md"):  # whose links are from the top
                content = LINK.sub(
                    lambda one: f"](../../{one['target']}{one['anchor'] or ''})" if _is_here(one["target"]) else one[0],
                    content,
                )
            added = File.generated(config, page_of(path), content=content)
            files.append(added)
            if path.endswith(".md"):
                left.append((added.src_uri, content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the pages that were added."""
    return linked(markdown, page.file.src_uri)


def _is_here(target: str) -> bool:
    return (ROOT / target.replace("\\_", "_")).exists()
