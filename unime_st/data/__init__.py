"""Data model: items, image references, pair records and record folders."""

from __future__ import annotations

from unime_st.data.images import BadImageError, ImageRef
from unime_st.data.items import Item
from unime_st.data.manifest import StageConflictError, is_complete, read_manifest, write_manifest
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.videos import BadVideoError, VideoRef

__all__ = [
    "BadImageError",
    "BadVideoError",
    "ImageRef",
    "Item",
    "PairRecord",
    "RecordSet",
    "StageConflictError",
    "VideoRef",
    "is_complete",
    "read_manifest",
    "write_manifest",
]
