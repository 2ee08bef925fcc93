"""The captions that a prepared folder keeps from the training. Importing this loads no torch."""

from pathlib import Path

import pyarrow as pa

from koala.data.shards import CAPTION, INDEX, SHARDS
from koala.errors import UserError


def held_out_captions(folder: str | Path) -> list[tuple[str, str]]:
    """Id and first caption of every held-out image, in the order of the index.

    UserError for a folder that is not completely prepared, or holds nothing out.
    """
    root = Path(folder)
    try:
        shards = pa.ipc.open_file(pa.memory_map(str(root / SHARDS))).read_all()
        index = pa.ipc.open_file(pa.memory_map(str(root / INDEX)))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not completely prepared: run the same `koala prepare` until it finishes"
        ) from error
    caption = next(name for name in index.schema.names if name.startswith(CAPTION))
    found: list[tuple[str, str]] = []
    for shard in shards.to_pylist():
        if shard["split"] != "train":
            batch = index.get_batch(shard["unit"]).slice(shard["first"], shard["rows"])
            found += zip(batch["id"].to_pylist(), batch[caption].to_pylist(), strict=True)
    if not found:
        raise UserError(
            f"{folder} holds nothing out, so it has no prompts: prepare it with --held-out 0.01"
        )
    return found
