"""mkdocs hook for links to files outside docs/: copies the linked files into the site, and links to the copies."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
TREE = "tree/"  # folder of the copies in the site


def _outside(text: str, folder: str) -> dict[str, str]:
    """Links of a page in `folder` of the repository that leave docs/: target as written -> path in the repository."""
    found = {}
    for _, target, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" not in target and not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            found[target] = path
    return found


def on_files(files: Files, config) -> Files:
    known, queue = set(), [(file.content_string, "docs") for file in files.documentation_pages()]
    while queue:
        text, folder = queue.pop()
        for path in set(_outside(text, folder).values()) - known:
            known.add(path)
            files.append(File.generated(config, TREE + path, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                queue.append(((ROOT / path).read_text(), posixpath.dirname(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(here.removeprefix(TREE) if here.startswith(TREE) else f"docs/{here}")

    def moved(match: re.Match) -> str:
        before, target, after = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target or not (ROOT / path).is_file():
            return match[0]
        inside = path.removeprefix("docs/") if path.startswith("docs/") else TREE + path
        return before + posixpath.relpath(inside, posixpath.dirname(here) or ".") + after

    return LINK.sub(moved, markdown)
