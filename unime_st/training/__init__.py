"""Training: rows of item ids, batches without duplicates, memory that does not grow with the batch, stock trainers."""

from __future__ import annotations

LOG = "log.jsonl"
"""Name of the loss curve in a trained model's folder."""
