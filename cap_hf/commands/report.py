"""`cap-hf report`: one page of what was run into a folder."""

from dataclasses import dataclass, field

from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, parse


@dataclass
class ReportArguments:
    """Which folder."""

    output_dir: str = field(
        default=DEFAULT_OUTPUT_DIR,
        metadata={"help": "The --output_dir of a run, or a folder of several; gets report.html and report/*.png."},
    )


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    (args,) = parse(argv, "report", "Make one page of what was run into a folder.", ReportArguments)
    # Imported here, because the arguments are checked before this takes its seconds.
    from cap_hf.pages.page import write_page

    print(f"The page is {write_page(args.output_dir)}")
