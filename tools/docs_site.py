"""What `mkdocs` needs beside docs/: README as the first page, and the files that pages link to.

Links of README and of docs/ are those of the repository, so that the files read as they are. On the
site README is index.md, and what a link finds outside of docs/ lies under repository/: source files
as pages, everything else as it is. The pages of commands and of Python names are written from the
code.
"""

import ast
import inspect
import os
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = {".py": "python", ".cu": "cpp", ".h": "c", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README, the command line's page, and the files that pages link to."""
    _add(files, config, "index.md", (ROOT / "README.md").read_text("utf-8"))
    _add(files, config, "command-line.md", command_line())
    _add(files, config, "python.md", python_names())
    waiting = {"README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())}
    seen = set()
    while waiting:
        seen.add(path := waiting.pop())
        if not path.endswith(".md") or not (ROOT / path).is_file():
            continue
        targets = {target for target, _ in links(path, (ROOT / path).read_text("utf-8"))}
        for target in targets - seen - waiting:
            if not target.startswith("docs/") and target != "README.md":
                _add_outside(files, config, target)
            waiting.add(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    here = _repository_path(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        place = os.path.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"]({place}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def links(path: str, text: str) -> list[tuple[str, str]]:
    """(target, anchor) of every link and image in a file, targets from the repository's root."""
    folder = posixpath.dirname(path)
    return [
        (posixpath.normpath(posixpath.join(folder, match[1])), (match[2] or "")[1:])
        for match in LINK.finditer(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    ]


def _site_path(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"repository/{target}" + (".md" if Path(target).suffix in CODE else "")


def _repository_path(place: str) -> str:
    """The inverse for pages: which file of the repository a page was made of."""
    if place == "index.md":
        return "README.md"
    if place.startswith("repository/"):
        return place.removeprefix("repository/")
    return f"docs/{place}"


def _add(files: Files, config: MkDocsConfig, place: str, content: str) -> None:
    files.append(File.generated(config, place, content=content))


def _add_outside(files: Files, config: MkDocsConfig, target: str) -> None:
    source = ROOT / target
    if not source.is_file():
        return  # mkdocs names the page whose link leads nowhere
    if language := CODE.get(source.suffix):
        text = source.read_text("utf-8")
        code = f"{UNSEARCHED}# {target}\n\n`````{language}\n{text}`````\n"
        _add(files, config, _site_path(target), code)
    else:
        files.append(File.generated(config, _site_path(target), abs_src_path=str(source)))


def command_line() -> str:
    """The help of every command."""
    import click

    from fastface_trt.cli.main import cli

    parts = ["# Command line", "", "What `fastface-trt COMMAND --help` prints."]

    def describe(name: str, command: click.Command, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=name, parent=parent, max_content_width=96)
        parts.extend(["", f"## {context.command_path.split(' ', 1)[1]}", ""])
        parts.extend(["```text", command.get_help(context).rstrip(), "```"])
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None
                describe(child, found, context)

    root = click.Context(cli, info_name="fastface-trt")
    for name in cli.list_commands(root):
        describe(name, cli.commands[name], root)
    return "\n".join(parts) + "\n"


def python_names() -> str:
    """Signatures and docstrings of the public names."""
    from fastface_trt import FastFace, GenerationRequest, GenerationResult
    from fastface_trt.embedding.session import Session
    from fastface_trt.errors import FastFaceError

    parts = [
        "# Python",
        "",
        "Public names of `fastface_trt`, and the session over your own memory.",
    ]
    shown: list[Any] = [FastFace, GenerationRequest, GenerationResult, FastFaceError, Session]
    for one in shown:
        parts.extend(["", f"## {one.__name__}", "", inspect.getdoc(one) or ""])
        for name, member in vars(one).items():
            function = getattr(member, "__func__", member)
            if name == "__call__" or not name.startswith("_"):
                if not inspect.isfunction(function) or function.__module__ != one.__module__:
                    continue
                # As the source writes it: evaluated types fill lines, and defaults have addresses.
                (written,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
                assert isinstance(written, ast.FunctionDef)
                head = f"{name}({ast.unparse(written.args)})"
                head = textwrap.fill(head, 84, subsequent_indent=" " * 8)
                parts.extend(["", "```python", head, "```", "", inspect.getdoc(function) or ""])
    return "\n".join(parts) + "\n"
