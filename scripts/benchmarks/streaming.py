"""Count the bytes that are fetched for the calibration examples of a dataset on a Hub, and the classes among them.

    python scripts/benchmarks/streaming.py --json streaming.json

A Hub on this machine (that of the tests) serves datasets of synthetic JPEGs in the order of their classes, the hardest
case: parquet as `push_to_hub` writes it now, parquet of row groups of 100 images as it wrote before, and tars in the
WebDataset format. Each is streamed in a process with an empty cache, as `cap-hf prune` does it, and as `datasets` does
it alone (`shuffle` with its default buffer, then `take`). What is counted is what the server sent of the files, also
what a reader that hangs up no longer wanted; of a tar that is up to some MB each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from results import Results

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.checkpoints import clean_environment
from support.dataset_hub import DatasetHub
from support.image_files import write_parquet, write_tars

STREAM = """
import collections, json, sys
name, column, count, how = sys.argv[1:]
if how == "cap_hf":
    from cap_hf.data.arguments import DataArguments
    from cap_hf.data.splits import load_splits

    args = DataArguments(dataset_name=name, label_column_name=column)
    labels = load_splits(args, 0, needed=["train"], train_examples=int(count))["train"][column][:]
else:
    import datasets

    stream = datasets.load_dataset(name, split="train", streaming=True).shuffle(seed=0).take(int(count))
    labels = [example[column] for example in stream]
classes = collections.Counter(labels)
print(json.dumps({"examples": len(labels), "classes": len(classes), "most_of_a_class": max(classes.values())}))
"""


# Name -> what writes it and the column of its labels.
DATASETS = {
    "parquet": (write_parquet, "label"),
    "parquet-of-100": (partial(write_parquet, old=True), "label"),
    "tars": (write_tars, "cls"),
}
HOWS = ("cap_hf", "datasets")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="images of each dataset")
    parser.add_argument("--shards", type=int, default=20, help="files of each dataset")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--side", type=int, default=72, help="pixels of an image's side; 72 make 5.5 KB")
    parser.add_argument("--count", type=int, default=1024, help="examples to stream")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--hows", nargs="+", choices=HOWS, default=list(HOWS), help="who streams")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def main() -> None:
    """Write the datasets, stream from each, and report."""
    args = parse()
    shape = {"shards": args.shards, "count": args.images, "classes": args.classes, "side": args.side}
    total = len(args.datasets) * len(args.hows)
    keys = ("dataset", "how")
    with tempfile.TemporaryDirectory() as scratch, DatasetHub() as hub, Results(args, total, keys) as results:
        for dataset in args.datasets:
            write, column = DATASETS[dataset]
            results.measuring(f"writing {dataset}")
            name = f"user/{dataset}"
            hub.datasets[name] = write(Path(scratch) / dataset, **shape)
            for how in args.hows:
                results.measuring(f"{dataset}, {how}")
                hub.sent = 0
                with tempfile.TemporaryDirectory() as home:
                    environment = clean_environment(Path(home), HF_ENDPOINT=hub.url)
                    command = [sys.executable, "-c", STREAM, name, column, str(args.count), how]
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found = {"dataset": dataset, "how": how, "sent_bytes": hub.settled(), "dataset_bytes": hub.size(name)}
                results.add(found | {"share": hub.sent / hub.size(name)} | json.loads(done.stdout))
                results.advance()


if __name__ == "__main__":
    main()
