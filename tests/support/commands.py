"""Commands as a user types them, on a model that takes no time."""

from pathlib import Path

from PIL import Image

from cap_hf.commands.main import main

FAST = ["--num_grads", "32", "--max_eval_samples", "50", "--disable_tqdm"]


def prune(model: Path, output: Path, *arguments: str) -> int:
    """Run `cap-hf prune`; return its exit code."""
    return main(["prune", "--model_name_or_path", str(model), "--output_dir", str(output), *FAST, *arguments])


def without_drops(metrics: dict) -> dict:
    """Return what is measured of a model without a dense one to compare it with."""
    return {name: value for name, value in metrics.items() if not name.endswith("_drop_se")}


def image_folder(folder: Path, splits: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """Write one grey image of 8x8 per split and class; return the folder."""
    for split in splits:
        for grey, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), grey).save(folder / split / name / "0.png")
    return folder


DIGITS = tuple(map(str, range(10)))
