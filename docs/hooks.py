"""Hooks of mkdocs: the front page is README.md, and the cards of the embedded models are pages, so that no text exists twice."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "src" / "difflex" / "models"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text lies elsewhere in the repository."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_from(readme, "docs/")))
    files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_text(encoding="utf-8")))
    for card in sorted(MODELS.glob("*/README.md")):
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)  # without its metadata
        files.append(File.generated(config, f"models/{card.parent.name}.md", content=_from(text, "../../../../docs/", "../")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to model cards at their pages."""
    return re.sub(r"\]\(\.\./src/difflex/models/([\w-]+)/README\.md\)", r"](models/\1.md)", markdown)


def _from(text: str, docs: str, up: str = "") -> str:
    """Return `text` with its links into the docs folder as links from a page of the site."""
    text = text.replace(f"]({docs}", f"]({up}").replace(f'src="{docs}', f'src="{up}').replace("](LICENSE)", "](LICENSE.txt)")
    return re.sub(r"\]\(src/difflex/models/([\w-]+)/README\.md\)", rf"]({up}models/\1.md)", text)
