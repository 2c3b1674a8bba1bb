"""The links of built pages, and which of them lead nowhere."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit


def broken_links(folder: Path) -> list[str]:
    """The links of a folder's pages that lead nowhere in it; those to other sites are not tried."""
    paths = sorted(folder.resolve().rglob("*.html"))
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    anchors = {path: attributes(page, "id") for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for link in sorted(attributes(page, "href|src")):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in anchors[target]):
                broken.append(f"{path.name}: {link}")
    return broken


def attributes(page: str, names: str) -> set[str]:
    """The values of these attributes; quotes of the text itself are written as entities."""
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    return set(re.findall(rf'\s(?:{names})="([^"]+)"', markup))
