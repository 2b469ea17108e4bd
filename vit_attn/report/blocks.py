"""What a report's page is made of, the same for HTML and Markdown; texts are plain and escaped by the templates."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph; ``lead`` is set larger."""

    kind: ClassVar = "text"
    text: str
    lead: bool = False


@dataclass(frozen=True)
class Items:
    """A list of points; as warnings, in a box that is seen."""

    kind: ClassVar = "items"
    items: tuple[str, ...]
    warning: bool = False


@dataclass(frozen=True)
class Header:
    """A column's head; numbers are set flush right."""

    title: str
    unit: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A table's cell; ``note`` is set smaller, below."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its head."""

    kind: ClassVar = "table"
    name: str
    headers: tuple[Header, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.headers) for row in self.rows), self.name


@dataclass(frozen=True)
class Picture:
    """A figure, inline and in figures/<name>.png; width and height in CSS pixels."""

    kind: ClassVar = "picture"
    name: str
    title: str
    caption: str
    alt: str
    base64: str
    width: int
    height: int


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away."""

    kind: ClassVar = "details"
    summary: str
    blocks: tuple["Block", ...]


Block = Text | Items | Table | Picture | Code | Details


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
