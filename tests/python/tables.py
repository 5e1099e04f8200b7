"""Parquet files as people make them and read them: `tables.py write|gzip IN` and `tables.py check IN OUT`."""

import sys
from datetime import date, datetime, timezone
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 25
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
# What is carried from the input to the output.
CARRIED = pa.schema(
    [
        ("topic", pa.string()),
        ("n", pa.int32()),
        ("x", pa.float64()),
        ("flag", pa.bool_()),
        ("price", pa.decimal128(18, 3)),
        ("day", pa.date32()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("tags", pa.list_(pa.string())),
        ("nested", pa.struct([("a", pa.int64()), ("b", pa.list_(pa.float32()))])),
    ]
)


def row(i):
    value = {
        "id": f"r{i}",
        "messages": [{"role": "user", "content": f"Sing of {i}."}],
        "topic": f"topic é {i}",
        "n": i,
        "x": i / 7,
        "flag": i % 2 == 0,
        "price": Decimal(i * 1001) / 1000 + 123456789012345,
        "day": date(2024, 2, 1 + i),
        "at": datetime(2024, 1, 1, 12, 30, i, 123456, tzinfo=timezone.utc),
        "tags": ["a", None, str(i)],
        "nested": {"a": i, "b": [0.5, None]},
    }
    if i % 5 == 4:
        value.update(dict.fromkeys(CARRIED.names))
    return value


def write(path, compression):
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(MESSAGE)), *CARRIED])
    table = pa.Table.from_pylist([row(i) for i in range(ROWS)], schema=schema)
    pq.write_table(table, path, row_group_size=7, compression=compression)


def check(path, output):
    before, after = pq.read_table(path), pq.read_table(output)
    assert after.schema.names[:8] == [
        *("id", "sample", "response", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "error")
    ], after.schema
    for name in ["id", *CARRIED.names]:
        assert after.schema.field(name).type.equals(before.schema.field(name).type), (name, after.schema)
        assert after.column(name).to_pylist() == before.column(name).to_pylist(), name
    assert after.column("sample").to_pylist() == [0] * ROWS
    assert all(isinstance(text, str) for text in after.column("response").to_pylist())
    assert after.column("error").null_count == ROWS


match sys.argv[1:]:
    case ["write", path]:
        write(path, "snappy")
    case ["gzip", path]:
        write(path, "gzip")
    case ["check", path, output]:
        check(path, output)
    case _:
        sys.exit(__doc__)
