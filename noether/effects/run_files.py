"""Names of the files and folders in the directory of a run, for what writes and what reads them."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "config.yaml"
METRICS_FILE: Final = "metrics.jsonl"
EVENTS_FILE: Final = "events.jsonl"
SUMMARY_FILE: Final = "summary.json"
TRACEBACK_FILE: Final = "traceback.txt"
EVALUATIONS: Final = "eval"
CHECKPOINTS: Final = "checkpoints"
MANIFEST: Final = "MANIFEST.json"
ENDED: Final = ".ended"
"""File with the text of a pointer: the run ended at this checkpoint, which was saved just before."""
NEVER_SAVED: Final = ".never-saved"
"""The marker of a run that has not saved a checkpoint yet."""
