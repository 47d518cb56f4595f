"""Build the site without warnings, and follow every link in it that stays in it.

Nothing is fetched: neither to build the pages nor to read them. Links to other hosts are written to
``external-links.txt`` in the site, one a line, with a page that has it.

    pip install -c constraints.txt ".[docs,train,huggingface]"
    python docs/build.py
"""

from __future__ import annotations

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}


class Page(HTMLParser):
    """What a page can be linked by, what it links to, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        for name in ("href", "src"):
            if name in values:
                loaded = (tag, name) in LOADED and values.get("rel") not in (
                    "next",
                    "prev",
                    "index",
                    "search",
                    "author",
                )
                (self.loaded if loaded else self.links).add(values[name])


def build(out: Path) -> int:
    """Sphinx's exit status; warnings are errors, references to nothing too."""
    from sphinx.cmd.build import build_main

    return build_main(["-b", "html", "-W", "--keep-going", "-n", "-q", "-E", str(HERE), str(out)])


def broken_links(out: Path) -> list[str]:
    """Links to a page or place that is not there, and whatever would be loaded from another host; a line each."""
    pages = {path.resolve(): Page(path) for path in sorted(out.rglob("*.html")) if "_static" not in path.parts}
    broken, external = [], {}
    for path, page in pages.items():
        here = path.relative_to(out.resolve())
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                external.setdefault(link, here)
                if link in page.loaded:
                    broken.append(f"{here} loads {link}")
            elif parts.scheme not in ("data", "mailto", "javascript"):
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                if not target.is_file():
                    broken.append(f"{here} links to {link}, which is not there")
                elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                    broken.append(f"{here} links to {link}, a page without that place")
    lines = [f"{link}\t{where}\n" for link, where in sorted(external.items())]
    (out / "external-links.txt").write_text("".join(lines), encoding="utf-8")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "site", help="the folder of the site")
    out: Path = parser.parse_args().out
    if status := build(out):
        return status
    broken = broken_links(out)
    print("\n".join([*broken, f"{len(broken)} broken links; the site is {out / 'index.html'}"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
