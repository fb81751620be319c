"""MkDocs hook of `mkdocs.yml`: adds pages that lie outside `docs/` to the site, and adapts links to and from them."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SITE_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "LICENSE": "license.md",
    "src/simpletuner/examples/tiny-lora/README.md": "example.md",
    "src/simpletuner/flux2/tiny/model/README.md": "embedded-model.md",
    "benchmarks/gpu/README.md": "gpu-benchmarks.md",
}
"""Path in the repository → path in the site, if the two differ. `docs/X` is `X`."""
REPOSITORY_PATHS = {page: path for path, page in SITE_PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside `docs/`."""
    for path, page in SITE_PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path == "LICENSE":
            text = f"# License\n\n```\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 (MkDocs passes by name)
    """Rewrite each relative link for the site. A link to no page of the site stays, and fails `--strict`."""
    source = page.file.src_uri
    repository_folder = posixpath.dirname(REPOSITORY_PATHS.get(source, f"docs/{source}"))

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(repository_folder, link[0]))
        site_path = SITE_PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(site_path, posixpath.dirname(source) or ".")

    return LINK.sub(in_site, markdown)
