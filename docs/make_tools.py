"""Write docs/tools.md.

The options are those of the tools' own parsers; the scripts of the shell are described by their first comment.
"""

import contextlib
import importlib.util
import os
import re
from argparse import SUPPRESS, ArgumentParser, _HelpAction
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parents[1] / "tools"
INTRODUCTION = """# Tools

Every tool of `tools/`, with its options. `python tools/train.py --help` prints the same. On bad input a tool
prints one line that begins with `error:`, exits with status 2, and writes nothing;
[troubleshooting](troubleshooting.md) lists these messages. `predict.py` leaves out images that it cannot read, and
`study.py` runs that fail; both name them and exit with status 1. Written by `python docs/make_tools.py`, checked by
the tests.
"""


class Captured(Exception):
    """Carries a parser out of the function that builds it."""


def parser_of(tool: Path) -> ArgumentParser:
    """Return the parser that the function ``parse_args`` of a tool builds."""

    def capture(parser, *_):
        raise Captured(parser)

    spec = importlib.util.spec_from_file_location(f"condattn_documented_{tool.stem}", tool)
    module = importlib.util.module_from_spec(spec)
    # Toolboxes print which optional packages are missing.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        spec.loader.exec_module(module)
    with mock.patch.object(ArgumentParser, "parse_args", capture):
        try:
            module.parse_args()
        except Captured as captured:
            return captured.args[0]
    raise ValueError(f"{tool}: its function parse_args has no parser")


def escape(text: str) -> str:
    """Escape what Markdown would take as emphasis or as the end of a cell."""
    return text.replace("*", "\\*").replace("|", "\\|")


def describe_parser(parser: ArgumentParser) -> list[str]:
    """Lines of Markdown: what the tool does, and a table of its arguments."""
    formatter = parser._get_formatter()
    lines = [parser.description.strip(), "", "| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, _HelpAction):
            continue
        values = formatter._format_args(action, action.dest.upper() if action.option_strings else action.dest)
        name = f"{', '.join(action.option_strings)} {values}".strip()
        meaning = formatter._expand_help(action) if action.help not in (None, SUPPRESS) else ""
        lines.append(f"| `{name}` | {escape(meaning)} |")
    if parser.epilog:
        lines += ["", parser.epilog]
    return lines


def describe_script(script: Path) -> list[str]:
    """Lines of Markdown: the first comment of a shell script, whose indented lines are commands."""
    comment = re.match(r"#!.*\n((?:#.*\n)+)", script.read_text())[1]
    lines = []
    for line in (line[2:] for line in comment.splitlines()):
        command = line.startswith("  ")
        if lines and command != lines[-1].startswith("    "):
            lines.append("")
        lines.append(f"    {line.strip()}" if command else line)
    return lines


def page() -> str:
    """Make the content of the page."""
    lines = [INTRODUCTION]
    for tool in sorted(TOOLS.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        lines += [f"## tools/{tool.relative_to(TOOLS)}", "", *describe_parser(parser_of(tool)), ""]
    for script in sorted(TOOLS.glob("*.sh")):
        lines += [f"## tools/{script.name}", "", *describe_script(script), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    Path(__file__).with_name("tools.md").write_text(page() + "\n")
