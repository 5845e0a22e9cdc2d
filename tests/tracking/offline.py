"""What an offline W&B run left in its files."""

from __future__ import annotations

import json
from pathlib import Path

from distcl.tracking.wandb import records


class OfflineRun:
    """What the processes of one run wrote, in order: rows of history, summary, config, files."""

    def __init__(self, out: Path) -> None:
        paths = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
        self.ids, self.rows, self.config, self.summary = set(), [], {}, {}
        self.artifacts, self.processes = [], len(paths)
        for path in paths:
            for record in records(path):
                self._take(record)

    def _take(self, record):
        if record.HasField("run"):
            self.ids.add(record.run.run_id)
            self.config |= values(record.run.config.update)
        elif record.HasField("history"):
            self.rows.append(values(record.history.item))
        elif record.HasField("summary"):
            self.summary |= values(record.summary.update)
        elif record.HasField("artifact"):
            self.artifacts.append(record.artifact)
        elif record.HasField("request") and record.request.HasField("log_artifact"):
            self.artifacts.append(record.request.log_artifact.artifact)


def values(items):
    """Return a record's items as a dict; a nested key becomes nested dicts."""
    found = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return found
