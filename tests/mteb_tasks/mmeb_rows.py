"""Changes a synthetic MMEB."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def rewrite(root, change, name="OVEN"):
    file = root / name / "test-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)
