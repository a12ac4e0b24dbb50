"""The site's home is README.md, and files of the repository that a page links to come along.

A link is written as GitHub follows it, from the file that it stands in. On the site README.md is `index.md`, what lies
in `docs/` keeps its place, and everything else lies in `repository/`. The atlas has its data in the page, as one
that is opened from a disk may read no other file.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)")
ROOT = Path(__file__).parents[1]
ATLAS, ATLAS_DATA = "<!-- atlas -->", ROOT / "bench" / "results" / "memory-atlas.json"
IN_NAV = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def _place(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _source(place: str) -> str:
    """The file of the repository that lies at a place of the site."""
    if place == "index.md":
        return "README.md"
    return place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}"


def _targets(path: str) -> list[str]:
    """The files that a page of the repository links to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = [normpath(PurePosixPath(path).parent / target) for _, target in LINK.findall(text)]
    return [target for target in found if (ROOT / target).is_file()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md and what is linked, from page to page."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + list(IN_NAV)
    seen = set(pages)
    for path in pages:
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            new = [target for target in dict.fromkeys(_targets(path)) if target not in seen]
            seen.update(new)
            pages += new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads every link to where its file lies on the site."""
    source = PurePosixPath(_source(page.file.src_uri)).parent
    here = str(PurePosixPath(page.file.src_uri).parent)

    def moved(found: re.Match[str]) -> str:
        target = normpath(source / found[2])
        return found[1] + (relpath(_place(target), here) if (ROOT / target).is_file() else found[2])

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Puts the atlas' data where its page has a mark."""
    if ATLAS not in output:
        return output
    # Nothing in a script may look like its end.
    data = ATLAS_DATA.read_text(encoding="utf-8").replace("</", "<\\/")
    return output.replace(ATLAS, f'<script type="application/json" id="atlas-data">{data}</script>')
