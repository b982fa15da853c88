"""MMEB-V2 for mteb: 24 visual-document tasks and 36 image tasks under the protocol of VLM2Vec-V2."""

from __future__ import annotations
