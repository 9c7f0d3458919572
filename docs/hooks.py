"""Hooks of mkdocs, so that no text exists twice: the front page is README.md, and pages are made of model cards and notebooks."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
MODELS, TUTORIALS = ROOT / "src" / "difflex" / "models", ROOT / "docs" / "tutorials"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text lies elsewhere in the repository."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_from(readme, "docs/")))
    files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_text(encoding="utf-8")))
    for card in sorted(MODELS.glob("*/README.md")):
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)  # without its metadata
        files.append(File.generated(config, f"models/{card.parent.name}.md", content=_from(text, "../../../../docs/", "../")))
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=_notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to model cards and notebooks at their pages."""
    markdown = re.sub(r"\]\(((?:tutorials/)?[\w-]+)\.ipynb\)", r"](\1.md)", markdown)
    return re.sub(r"\]\(\.\./src/difflex/models/([\w-]+)/README\.md\)", r"](models/\1.md)", markdown)


def _from(text: str, docs: str, up: str = "") -> str:
    """Return `text` with its links into the docs folder as links from a page of the site."""
    text = text.replace(f"]({docs}", f"]({up}").replace(f'src="{docs}', f'src="{up}').replace("](LICENSE)", "](LICENSE.txt)")
    return re.sub(r"\]\(src/difflex/models/([\w-]+)/README\.md\)", rf"]({up}models/\1.md)", text)


def _notebook(path: Path) -> str:
    """Return a notebook with its stored outputs as a page; it is not executed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [f'<div class="output">{_output(output)}</div>' for output in cell.get("outputs", [])]
    download = f'<a href="{path.name}" download>Download this page as a notebook</a>'
    return "\n\n".join([*parts, download]) + "\n"


def _output(output: dict[str, Any]) -> str:
    """Return an output of a cell as HTML."""
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "text/html" in data:
        return "".join(data["text/html"])
    # An empty line would end the HTML block.
    return f"<pre>{escape(''.join(data['text/plain']).rstrip()).replace(chr(10), '&#10;')}</pre>"
