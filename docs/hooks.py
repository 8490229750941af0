"""What mkdocs makes of the code: commands, numbers, examples and links, so that the pages cannot drift."""

from __future__ import annotations

import ast
import html
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from gradmend.causes import Cause
from gradmend.cli import app
from gradmend.errors import NoEffectWarning
from gradmend.remedies import REMEDIES, Change, Remedy
from gradmend.remedies.card import Card, cards
from gradmend.remedies.code import code as written
from gradmend.setup import Setup

SMALL = ("plain", "bounded", "convolutional", "normalized", "gated")
"""The setups on which remedies are shown."""

HERE = Path(__file__).parent
ROOT = HERE.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files."""
    made = {
        "commands.md": commands(),
        "numbers.md": numbers(),
        "changelog.md": moved("CHANGELOG.md"),
        "contributing.md": moved("CONTRIBUTING.md"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what a page takes from the code."""
    fill = {"causes.md": causes, "remedies.md": remedies}.get(page.file.src_uri)
    markdown = fill(markdown) if fill else markdown
    return re.sub(r"<!-- readme: (.+?) -->", lambda match: readme_block(match[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _mathml, content, flags=re.S)


def on_post_page(output: str, **_: Any) -> str:
    """The theme's search is a dialog without a name."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    formula: str = convert(html.unescape(found[3]).strip(), display=display)
    return formula


# ---- what stands elsewhere --------------------------------------------------------------------------------


def moved(name: str) -> str:
    """A file of the project as a page: its links lead to pages."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def readme_block(start: str) -> str:
    """The README's block of code that begins with this line."""
    blocks = re.findall(r"```.*?```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if start in block)


def numbers() -> str:
    """The README's table of numbers, each with its command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Numbers\n")[1].split("\n## ")[0].strip()
    return f"# Measured\n\n{section}\n"


def commands() -> str:
    """`--help` of every command."""
    known: dict[str, click.Command] = get_command(app).commands  # type: ignore[attr-defined]
    head = (
        "# Command line\n\nMade from `gradmend COMMAND --help`. Exit code 0: healthy or mended; 1: findings "
    )
    head += "remain, or some trials failed; 2: bad input."
    return "\n\n".join((head, *(_command(name, known[name]) for name in known))) + "\n"


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"gradmend {name}", max_content_width=76, terminal_width=76)
    return f"## {name}\n\n```text\n{command.get_help(context).strip()}\n```"


# ---- causes -----------------------------------------------------------------------------------------------


@cache
def examples() -> ModuleType:
    """The module with an example for each cause."""
    sys.path.insert(0, str(HERE))
    try:
        import examples as found
    finally:
        sys.path.remove(str(HERE))
    return found


def causes(markdown: str) -> str:
    """Under each cause: which remedies treat it, and the shortest setup that has it."""
    head, rest = markdown.split("\n- ", 1)
    shared = folded("The lines that all examples share", block(shared_lines()))
    markdown = f"{head}\n{shared}\n\n- {rest}"
    return _after_headings(markdown, {cause.title: _of_cause(cause) for cause in Cause})


def _of_cause(cause: Cause) -> str:
    tried = [
        f"[{card.name}](remedies.md#{card.name.lower()})" for card in cards() if cause.title in card.treats
    ]
    remedies = f"- **Tried by `mend`:** {', '.join(tried)}\n" if tried else ""
    make = getattr(examples(), cause.value, None)
    return remedies + ("" if make is None else f"\n{folded('Example', block(shown(make)))}\n")


def shared_lines() -> str:
    """What stands before the first example."""
    text = inspect.getsource(examples())
    return text.split("share these lines\n")[1].split("\n\n# ---")[0].strip()


def shown(make: Callable[[], Any]) -> str:
    """The body of an example as one would type it: what it returns is diagnosed."""
    before, returned = parts(make)
    if not before and len(returned) == 1:
        return f"print(*{returned[0]})"
    if len(returned) == 1:
        return f"{before}\nprint(*{returned[0]})"
    steps = f", steps={returned[2]}" if len(returned) > 2 else ""
    return f"{before}\nsetup = {returned[0]}\nprint(gm.diagnose(setup, {returned[1]}{steps}))".strip()


def parts(make: Callable[[], Any]) -> tuple[str, list[str]]:
    """The lines of a function before its `return`, and what it returns, one by one."""
    source = textwrap.dedent(inspect.getsource(make))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    before = source.splitlines()[1 : last.lineno - 1]
    returned = [ast.get_source_segment(source, value) or "" for value in values if value is not None]
    return textwrap.dedent("\n".join(before)).strip(), returned


# ---- remedies ---------------------------------------------------------------------------------------------


def remedies(markdown: str) -> str:
    """Causes that a card names become links."""
    titles = {cause.title for cause in Cause}

    def linked(found: re.Match[str]) -> str:
        named = found[1].split(", ")
        links = [f"[{n}](causes.md#{n.replace(' ', '-')})" if n in titles else n for n in named]
        return f"- **Treats:** {', '.join(links)}"

    markdown = re.sub(r"^- \*\*Treats:\*\* (.*)$", linked, markdown, flags=re.M)
    return _after_headings(markdown, {card.name: _of_remedy(card) for card in cards()})


def _of_remedy(card: Card) -> str:
    """What it writes for the first setup where it has something to do: the small ones, then ill ones."""
    remedy = next(remedy for remedy in REMEDIES if type(remedy).__name__ == card.name)
    ill = [title.replace(" ", "_") for title in card.treats]
    for make in (getattr(examples(), name) for name in (*SMALL, *ill) if hasattr(examples(), name)):
        if change := _applied(remedy, make):
            before, (setup, batch, *_) = parts(make)
            asked = f"setup = {setup}\nprint(code([{remedy!r}.apply(setup, {batch})]))"
            text = f"{block(f'{before}{chr(10)}{asked}'.strip())}\n\n{block(_without_helpers(change))}"
            return folded("Example, and the code that it gives", text)
    return ""


def _without_helpers(change: Change) -> str:
    text = written([change])
    return f"...\n\n# {change.text}{text.split(f'# {change.text}')[1].rstrip()}"


def _applied(remedy: Remedy, make: Callable[[], Any]) -> Change | None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        try:
            made = make()
            return remedy.apply(*made[:2]) if isinstance(made[0], Setup) else None
        except NoEffectWarning:
            return None


# ---- Markdown ---------------------------------------------------------------------------------------------


def _after_headings(markdown: str, texts: dict[str, str]) -> str:
    """Put texts at the ends of the sections of the third degree with these titles."""
    parts = re.split(r"^(?=#{2,3} )", markdown, flags=re.M)
    return "".join(f"{part.rstrip()}\n{texts.get(_title(part), '')}\n" for part in parts)


def _title(part: str) -> str:
    return part.split("\n", 1)[0].removeprefix("### ")


def block(text: str, language: str = "python") -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"


def folded(title: str, text: str) -> str:
    """What opens when it is asked for."""
    return f'??? example "{title}"\n\n{textwrap.indent(text, "    ")}'
