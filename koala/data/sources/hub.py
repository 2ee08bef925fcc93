"""What the package `datasets` reads: data sets of the Hugging Face Hub, folders laid out for it.

It downloads and unpacks a data set once and keeps it as Arrow files in its cache, which
`koala.data.sources.saved` then reads. `fetch` is apart from the source itself, since only a run may
download, not the checks before it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala.data.sources.saved import Arrow
from koala.errors import UserError

DATASETS = "datasets"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # org/name


@dataclass(frozen=True)
class HubData:
    """A data set that is still to be fetched.

    path: ORG/NAME, or a local folder. config: one of its configurations, if it has several.
    """

    path: str | Path
    config: str | None = None

    def fetch(self) -> Arrow:
        """The data set in the cache, all of its splits. UserError if it cannot be had."""
        import datasets

        try:
            found: Any = datasets.load_dataset(str(self.path), self.config)
        except Exception as error:  # a reader of every layout raises what any of them raises
            why = " ".join(str(error).split())[:300]
            elsewhere = (
                '; without a network, `load_dataset("ORG/NAME").save_to_disk("DIR")` where there '
                "is one makes a folder to copy and to give here"
            )
            raise UserError(
                f"datasets cannot load {self.path} ({why}); a configuration is named as in "
                f"{self.path}:CONFIG{'' if Path(self.path).exists() else elsewhere}"
            ) from None
        files = [
            (f"{split}/{Path(file['filename']).name}", Path(file["filename"]))
            for split, rows in found.items()
            for file in rows.cache_files
        ]
        return Arrow(DATASETS, tuple(files))


def hub_data(place: str, kind: str | None) -> HubData | None:
    """The data set that `place` names, if it names one: ORG/NAME, ORG/NAME:CONFIG.

    None if it is no such name, or more likely a misspelt path, since there is a folder ORG. With
    the kind "datasets" also a folder, or FOLDER:CONFIG.
    """
    if kind == DATASETS and Path(place).exists():
        return HubData(place)
    name, _, config = place.partition(":")
    of_hub = _ID.fullmatch(name) and not Path(name).parent.exists()
    if kind in (None, DATASETS) and (of_hub or (kind and Path(name).exists())):
        return HubData(name, config or None)
    return None
