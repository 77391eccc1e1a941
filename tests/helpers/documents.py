"""Markdown documents as tests read them: fenced blocks, inline code, links, headings and quoted figures.

The word after a block's language is a mark, which says how far tests go with it:

    ```sh             every line runs in `make test`, on a small dataset and small encoders
    ```sh long        every line runs in `make test-long`
    ```sh gpu         the lines are parsed alone: they need a GPU (or `network`, or `cluster`)
    ```sh checks      the lines are parsed alone: they start the project's own checks, which hold this test
    ```python         runs; takes the same marks
    ```text           no command: output, a folder's layout
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("recipes/README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
)
COMMAND_LANGUAGES = frozenset(("sh", "python"))
DATA_LANGUAGES = frozenset(("text", "tsv", "csv", "json", "yaml", "toml", "cpp"))
PARSED_ONLY = frozenset(("gpu", "network", "cluster", "checks"))
MARKS = PARSED_ONLY | {"long"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, the line where its text starts, its language, its marks and its text."""

    document: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        """Return FILE:LINE."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Return True if `make test` or `make test-long` runs the block."""
        return self.language in COMMAND_LANGUAGES and not PARSED_ONLY & set(self.marks)

    @property
    def is_long(self) -> bool:
        """Return True if `make test` leaves the block to `make test-long`."""
        return self.runs and "long" in self.marks


@dataclass(frozen=True)
class Figures:
    """An HTML comment that says where the figures of the text before it come from.

    text: the lines between the comment and the empty line before them, such as a table.
    sources: pairs of a figure as the text writes it and the expression that gives it.
    """

    document: Path
    line: int
    text: str
    sources: tuple[tuple[str, str], ...]


@cache
def _tokens(document: Path) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8")))


@cache
def _inline_tokens(document: Path) -> tuple[Token, ...]:
    blocks = (token for token in _tokens(document) if token.type == "inline")
    return tuple(child for block in blocks for child in block.children or ())


def blocks_of(document: Path) -> list[Block]:
    """Return a document's fenced blocks, in order."""
    blocks = []
    for token in _tokens(document):
        if token.type in ("fence", "code_block"):
            language, *marks = token.info.split() or [""]
            first_line = (token.map or [0])[0] + 2
            blocks.append(Block(document, first_line, language, tuple(marks), token.content))
    return blocks


def problem_of(block: Block) -> str | None:
    """Return the reason why tests can neither run nor parse a block, or None."""
    if block.language in DATA_LANGUAGES:
        commands = re.findall(r"^(?:\$ |iisan-fast |make |pip |python |git )", block.text, flags=re.MULTILINE)
        if block.marks:
            return f"{block.place}: a block of {block.language} takes no mark, this has {' '.join(block.marks)}"
        return f"{block.place}: commands want a block of sh" if commands else None
    if block.language not in COMMAND_LANGUAGES:
        return f"{block.place}: language {block.language!r} is none of sh, python, {', '.join(sorted(DATA_LANGUAGES))}"
    if set(block.marks) - MARKS or len(block.marks) > 1:
        return f"{block.place}: marks {' '.join(block.marks)!r}, expected at most one of {', '.join(sorted(MARKS))}"
    return None


def inline_code(document: Path) -> list[str]:
    """Return the code spans of a document, in order."""
    return [" ".join(token.content.split()) for token in _inline_tokens(document) if token.type == "code_inline"]


def link_targets(document: Path) -> list[str]:
    """Return where a document's links and images point."""
    names = {"link_open": "href", "image": "src"}
    targets = [str(token.attrGet(names[token.type])) for token in _inline_tokens(document) if token.type in names]
    return [target for target in targets if target]


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives a document's headings."""
    tokens = _tokens(document)
    names: list[str] = []
    for opening, inline in zip(tokens, tokens[1:]):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = sum(1 for other in names if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
            names.append(f"{name}-{repeats}" if repeats else name)
    return set(names)


def figures_of(document: Path) -> Iterator[Figures]:
    """Yield the comments `<!-- figures … -->` of a document, each with the paragraph or table before it."""
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"<!-- figures\n(.*?)-->", text, flags=re.DOTALL):
        before = text[: match.start()]
        sources = []
        for line in match[1].splitlines():
            figure, _, expression = line.partition(" = ")
            sources.append((figure.strip(), expression.strip()))
        paragraph = before.rstrip().rpartition("\n\n")[2]
        yield Figures(document, before.count("\n") + 1, paragraph, tuple(sources))
