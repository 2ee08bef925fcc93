"""Lets the site show the repository as it is.

Pages link to one another, to README.md and to the records in benchmarks/ by where these lie in the
repository, so that the links also work where git is hosted. Here the files outside docs/ join the
site, and each link becomes one within it. A link to a file that the site lacks fails the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HOME = "README.md"  # in the repository; index.md on the site
TOP = (HOME, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "NOTICE", "CITATION.cff")
RECORDS = (".md", ".json", ".jsonl", ".csv", ".png")

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages at the top of the repository and the records of benchmarks/."""
    records = (path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in RECORDS)
    for path in (*(ROOT / name for name in TOP), *sorted(records)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _on_site(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page with its links as they are on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(_in_repository(here))

    def moved(link: re.Match[str]) -> str:
        target, hash, anchor = link[2].partition("#")
        if not target or ":" in target:
            return link[0]
        there = _on_site(posixpath.normpath(posixpath.join(folder, target)))
        return link[1] + posixpath.relpath(there, posixpath.dirname(here)) + hash + anchor + link[3]

    return _LINK.sub(moved, markdown)


def _on_site(path: str) -> str:
    return "index.md" if path == HOME else path.removeprefix("docs/")


def _in_repository(uri: str) -> str:
    if uri == "index.md":
        return HOME
    return uri if (ROOT / uri).is_file() else f"docs/{uri}"
