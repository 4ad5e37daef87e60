"""The pages of the repository and their fenced blocks.

A block runs unless the comment on the line before it says what it needs, or which test runs it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ]
)
NEEDS = {"weights", "gpu", "network", "minutes", "docker", "cluster"}
LANGUAGES = {"sh", "python", "text", "yaml", "cmake", "cpp"}


@dataclass(frozen=True)
class Block:
    """A fenced block: `mark` is the comment before it, without its arrows."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether it is code that this folder's tests run."""
        return self.language in ("sh", "python") and not self.mark

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(page, text[: match.start(2)].count("\n") + 1, match[2], match[1] or "", match[3])
        for match in re.finditer(
            r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        )
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
