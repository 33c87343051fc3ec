"""What mkdocs needs for the course: each notebook of docs/ as a page, run for it, with its outputs and pictures.

EXECUTE_COURSE=false leaves out the running, for a site that is built to be looked over. Links to notebooks lead to
their pages.
"""

import os
import re
from pathlib import PurePosixPath
from typing import Any

import nbconvert
import nbformat
from mkdocs.structure.files import File, Files
from nbconvert.preprocessors import ExecutePreprocessor

EXECUTES = os.environ.get("EXECUTE_COURSE", "true") != "false"
_QUIET = ["--log-level=40"]  # a kernel warns of its own transport
LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)\.ipynb(?P<anchor>#[^)\s]*)?\)")


def page_of(path: str, folder: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, which runs in `folder`, and its pictures by their names."""
    notebook = nbformat.read(path, as_version=4)
    if EXECUTES:
        run = ExecutePreprocessor(timeout=600, kernel_name="python3", extra_arguments=_QUIET)
        run.preprocess(notebook, {"metadata": {"path": folder}})
    exporter = nbconvert.MarkdownExporter()
    text, resources = exporter.from_notebook_node(
        notebook, {"unique_key": PurePosixPath(path).stem, "output_files_dir": "."}
    )
    return text, resources.get("outputs") or {}


def on_files(files: Files, config: Any) -> Files:
    """Add a page, and its pictures, for each notebook, which itself can be downloaded."""
    for file in list(files):
        if not file.src_uri.endswith(".ipynb"):
            continue
        page = PurePosixPath(file.src_uri)
        text, pictures = page_of(file.abs_src_path, str(PurePosixPath(file.abs_src_path).parent))
        files.append(File.generated(config, str(page.with_suffix(".md")), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, str(page.parent / name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to notebooks at their pages."""
    return LINK.sub(lambda link: f"]({link['target']}.md{link['anchor'] or ''})", markdown)
