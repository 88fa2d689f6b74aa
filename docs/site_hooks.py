"""Hooks of mkdocs: what the pages of docs/ link to outside docs/ becomes part of the site, or a link to the repository.

On a code hosting page, ``[configs](../configs/README.md)`` and ``![curves](../results/NAME/curves.svg)`` work as they
stand. In the site, pictures of ``results/`` are copied to the folder ``results`` of the site, and every other file or
folder becomes its address in the repository, below ``repo_url``. A link to what does not exist fails a strict build.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".svg", ".png", ".jpg")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""The path of a relative link, without its anchor."""
ROLE = re.compile(r":[a-z]+:(?=<code>)")
"""The role in front of a name in a docstring, as ':func:' is in ':func:`measure`'."""
log = logging.getLogger(f"mkdocs.hooks.{Path(__file__).stem}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of ``results/`` to the files of the site."""
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in PICTURES:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_) -> str:
    """Replace the links of a page that leave ``docs/``."""
    path = Path(page.file.abs_src_path)
    return LINK.sub(lambda match: replace_link(match[1], path, Path(config.docs_dir), config.repo_url), markdown)


def replace_link(link: str, page: Path, docs: Path, repository: str) -> str:
    """Return what takes the place of a relative link of a page.

    Args:
        link: The path in the link.
        page: The file of the page.
        docs: The folder of all pages.
        repository: The address of the repository.

    Returns:
        The link itself if it stays in ``docs``; the picture's place in the site; or an address in the repository.
    """
    path = Path(os.path.normpath(page.parent / link))
    if path.is_relative_to(docs):
        return link
    if not path.exists() or not path.is_relative_to(ROOT):
        log.warning("%s links to '%s', which does not exist", page, link)
        return link
    name = path.relative_to(ROOT).as_posix()
    if path.suffix in PICTURES:
        return os.path.relpath(docs / name, page.parent)
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{name}"


def on_page_content(html: str, **_) -> str:
    """Remove the roles of names in docstrings, which Markdown does not know."""
    return ROLE.sub("", html)
