"""Names of the files and folders in a run directory, shared by the code that writes and the code that reads them."""

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
"""Names, as a pointer does, the checkpoint at which the run ended."""
NEVER_SAVED: Final = ".never-saved"
"""Marks a run that has not saved a checkpoint yet."""
