"""Long work that may be stopped: finished records are kept as JSON lines, and the next run continues from there."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


class ProgressFile:
    """JSON lines to which finished records are appended; `records` holds those of earlier runs.

    The first line holds the settings that the records depend on. A last line that a stopped process left incomplete
    is removed.

    Raises ValueError for a file that was begun with other settings, and for one that is not a progress file.
    """

    def __init__(self, file: str | os.PathLike, settings: dict):
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        begun, *self.records = self._read() or [settings]
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{file} was begun with {name} {begun.get(name)!r}, not {value!r}; choose another file or delete "
                    "this one."
                )
        if not self.file.exists() or not self.file.stat().st_size:
            self.append([settings])

    def append(self, records: Iterable[dict]) -> None:
        with open(self.file, "ab") as opened:
            opened.write("".join(json.dumps(record) + "\n" for record in records).encode())

    def _read(self) -> list[dict]:
        if not self.file.exists():
            return []
        whole = self.file.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in complete.splitlines()]
            if not all(isinstance(record, dict) for record in records):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{self.file} is not the progress file of a stopped run; choose another file or delete this one."
            ) from None
        if len(complete) < len(whole):
            os.truncate(self.file, len(complete))
        return records


def digest(data: object) -> str:
    """A short fingerprint of any JSON value."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
