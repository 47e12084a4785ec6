"""Streams a part of a split: some examples from each of many places in it, so that few bytes show much of it.

A dataset may lie in the order of its classes, and the first examples of a file are then all alike. A *place* is what
can be begun in the middle of a dataset without what stands before it: a row group of a parquet file, else a shard (a
tar, or a group of files). The seed fixes the order of the places. `PLACES` of them are open at a time and give an
example each in turn; of a parquet file only the columns and pages that are read are fetched. What comes is a matter of
the dataset and the seed alone, never of how fast the network is.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, islice, zip_longest
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import xopen

Example = dict[str, Any]
Examples = Generator[Example, None, None]
Place = Callable[[], Examples]

# Places that are open at a time. More of them show more of the dataset; each costs a footer and a page of its own.
PLACES = 32
# A dataset of more shards than this (images that are files of their own) is cut into so many groups of shards.
MAX_GROUPS = 1000
# Bytes of a column that are asked for at a time within a parquet file, whose pages have up to 1 MB; and what a remote
# file reads ahead of each request, 5 MB by default: columns are read in turn, so what lies behind is of no use.
BUFFER_BYTES = 1 << 16
AHEAD_BYTES = 1 << 12
ROWS = 8


class Streamer:
    """Reads the splits of one dataset, on the Hub or in a folder, without downloading them.

    Args:
        builder: from `datasets.load_dataset_builder`.

    Attributes:
        splits: their names.
    """

    def __init__(self, builder: datasets.DatasetBuilder) -> None:
        self.builder = builder
        self.splits = [str(name) for name in builder.config.data_files]
        self.download = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
        # Images that are files would be fetched ahead, many more than are asked for.
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0
        self._streams: dict | None = None

    @property
    def streams(self) -> dict:
        """Return the splits as `datasets` streams them; the first look reads one file's footer, or its beginning."""
        if self._streams is None:
            self._streams = self.builder.as_streaming_dataset()
        return self._streams

    def features(self, split: str) -> datasets.Features:
        """Return the columns of a split and what they hold."""
        stream = self.streams[split]
        return stream.features or stream._resolve_features().features

    def read(
        self,
        split: str,
        columns: list[str],
        seed: int,
        ahead: int = 0,
        share: float | None = None,
        held_out: bool = False,
    ) -> Examples:
        """Yield the examples of a split in an order that the seed fixes, images as their encoded bytes.

        Args:
            split: which.
            columns: what is read of it.
            seed: of the order of the places, of what is held out and of the buffer.
            ahead: examples in the buffer that the next one is drawn from.
            share: of the examples that are held out of the split, in (0, 1); None where it is used as it is.
            held_out: yield the examples that are held out, not the others.
        """
        rng = np.random.default_rng(seed)
        places = self._row_groups(split, columns, rng) if self._is_parquet else self._shards(split, columns, rng)
        if share is not None:
            places = (partial(_part, place, (seed, number), share, held_out) for number, place in enumerate(places))
        with closing(in_turn(places)) as examples:
            yield from map(self._with_bytes, buffered(examples, ahead, np.random.default_rng((seed, ahead))))

    @property
    def _is_parquet(self) -> bool:
        return isinstance(self.builder, Parquet)

    def _row_groups(self, split: str, columns: list[str], rng: np.random.Generator) -> Iterator[Place]:
        """Yield the row groups: one of each of `PLACES` files, then another of each; then those of other files."""
        files = list(self.builder.config.data_files[split])
        order = iter(rng.permutation(len(files)))
        while some := [files[index] for index in islice(order, PLACES)]:
            with ThreadPoolExecutor() as pool:
                footers = list(pool.map(self._footer, some))
            groups = [
                [
                    partial(self._rows, file, footer, int(group), columns)
                    for group in rng.permutation(footer.num_row_groups)
                ]
                for file, footer in zip(some, footers, strict=True)
            ]
            yield from filter(None, chain.from_iterable(zip_longest(*groups)))

    def _shards(self, split: str, columns: list[str], rng: np.random.Generator) -> Iterator[Place]:
        stream = self.streams[split].select_columns(columns)
        for column, feature in self.features(split).items():
            if column in columns and isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        count = min(stream.num_shards, MAX_GROUPS)
        for index in rng.permutation(count):
            yield partial(iter, stream.shard(count, int(index)))

    def _open(self, file: str) -> Any:
        return xopen(file, "rb", block_size=AHEAD_BYTES, download_config=self.download)

    def _footer(self, file: str) -> pq.FileMetaData:
        with self._open(file) as opened:
            return pq.ParquetFile(opened).metadata

    def _rows(self, file: str, footer: pq.FileMetaData, group: int, columns: list[str]) -> Examples:
        # Page by page as rows are asked for; with its default settings Arrow fetches the whole row group.
        settings = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
        with self._open(file) as opened, pq.ParquetFile(opened, metadata=footer, **settings) as parquet:
            for batch in parquet.iter_batches(ROWS, [group], columns):
                yield from batch.to_pylist()

    def _with_bytes(self, example: Example) -> Example:
        """Fetch what an example has only the address of."""
        for value in example.values():
            if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
                with xopen(value["path"], "rb", download_config=self.download) as file:
                    value["bytes"] = file.read()
        return example


def in_turn(places: Iterator[Place]) -> Examples:
    """Yield an example of each of `PLACES` places in turn; a place that has ended makes room for the next one.

    The places of a round are waited for together, since each is a request or two. Their order is the order of the
    examples.
    """
    opened: list[Examples] = []
    with ThreadPoolExecutor(PLACES) as pool:
        try:
            while True:
                opened += [place() for place in islice(places, PLACES - len(opened))]
                if not opened:
                    return
                found = list(pool.map(_next, opened))
                opened = [each for each, example in zip(opened, found, strict=True) if example is not None]
                yield from (example for example in found if example is not None)
        finally:
            pool.shutdown(cancel_futures=True)
            for each in opened:
                each.close()


def buffered(examples: Iterator[Example], size: int, rng: np.random.Generator) -> Examples:
    """Yield examples drawn at random from a buffer of the next `size`, or as they come with none."""
    buffer = list(islice(examples, size))
    for example in examples:
        if buffer:
            index = int(rng.integers(len(buffer)))
            example, buffer[index] = buffer[index], example
        yield example
    yield from (buffer[index] for index in rng.permutation(len(buffer)))


def _next(examples: Iterator[Example]) -> Example | None:
    return next(examples, None)


def _part(place: Place, seed: tuple[int, int], share: float, held_out: bool) -> Examples:
    """Yield the examples of a place that are held out, or the others: the same ones however much is read."""
    rng = np.random.default_rng(seed)
    with closing(place()) as examples:
        for example in examples:
            if (rng.random() < share) == held_out:
                yield example
