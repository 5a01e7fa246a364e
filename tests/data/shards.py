"""Small shards of records to be streamed."""

import itertools

import pyarrow
import pyarrow.parquet


def turns(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


def numbered_shards(folder, sizes):
    """Parquet files of so many records, each of which asks for its own number, counted over all of them."""
    numbers = itertools.count()
    return tuple(
        write_parquet(
            folder / f"{shard}.parquet",
            [{"id": "same", "conversations": turns(f"number {next(numbers)}"), "extra": 1} for _ in range(size)],
        )
        for shard, size in enumerate(sizes)
    )


def mixed_shards(folder, sizes):
    """Parquet files of so many records about an image, every fifth about a film, others text alone; lengths differ."""
    numbers = itertools.count()
    return tuple(
        write_parquet(folder / f"{shard}.parquet", [_mixed(next(numbers)) for _ in range(size)])
        for shard, size in enumerate(sizes)
    )


def _mixed(number):
    kind = {0: "video", 2: "text", 4: "text"}.get(number % 5, "image")
    mark = "" if kind == "text" else f"<{kind}>\n"
    media = {"image": None, "video": None, kind: {"bytes": b"pixels", "path": None}}
    words = "word " * (7 * number % 40)
    return {"conversations": turns(f"{mark}{words}"), "image": media["image"], "video": media["video"]}
