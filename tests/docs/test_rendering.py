"""The rendered pages have everything that there is, told by what users see: `--help` and docstrings."""

import re

import pytest
from support.pages import ROOT, cli, python_api

import cap_hf
from cap_hf.commands.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_of_help_is_on_the_page(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    helped = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
    section = (ROOT / "docs" / "cli.md").read_text().split(f"## cap-hf {command}\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"^\| `(--\w+)`", section, re.MULTILINE))
    assert "--output_dir" in shown
    # `--no_x` switches off what is on by default; its row is that of `--x`.
    assert {name for name in helped - shown if name.replace("--no_", "--") not in shown} == set()
    assert shown <= helped


def test_defaults_and_values_of_arguments():
    page = cli.render()
    for row in (
        "| `--model_name_or_path` | text | required |",
        "| `--method` | `cap`, `obs`, `sparsegpt`, `wanda`, `magnitude` | `cap` |",
        "| `--sparsity` | text; several |  |",
        "| `--max_accuracy_drop` | number |  |",
        "| `--do_eval` | true, false | `true` |",
        "| `--batch_sizes` | whole number; several | `1 8` |",
    ):
        assert row in page


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "python.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == cap_hf.__all__
    # HfArgumentParser changes the types of the fields that it has seen; the page has those of the source.
    cli.parser_of("prune")
    assert "| `damp` | `float \\| None` | `None` |" in python_api.entry("CAPConfig", cap_hf.CAPConfig)


def example(first: int, *rest: "str", flag: bool = False, **options: float) -> "list[int]":
    """Return something.

    More about it.

    Args:
        first: of all,
            on two lines: really.
        rest: others.

    Returns:
        A list
        of numbers.

    Raises:
        ValueError: never.
    """
    return [first]


def test_a_docstring_as_markdown():
    assert python_api.entry("example", example) == "\n".join(
        [
            "## example\n",
            "```text\nexample(first: int, *rest: str, flag: bool = False, **options: float) -> list[int]\n```\n",
            "Return something.\n\nMore about it.\n",
            "**Args**\n\n- `first`: of all, on two lines: really.\n- `rest`: others.\n",
            "**Returns**\n\nA list of numbers.\n",
            "**Raises**\n\n- `ValueError`: never.\n",
        ]
    )


def test_a_long_signature_has_a_line_for_each_argument(monkeypatch):
    monkeypatch.setattr(python_api, "WIDTH", 40)
    inside = "    first: int,\n    *rest: str,\n    flag: bool = False,\n    **options: float,\n"
    assert python_api.signature(example, "example") == f"```text\nexample(\n{inside}) -> list[int]\n```\n"
