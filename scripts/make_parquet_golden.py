#!/usr/bin/env python3
"""Writes tests/golden/parquet: small tables as the Hub's converter (pyarrow) writes them, and their rows as JSON lines.

Needs pyarrow. usage: make_parquet_golden.py [FOLDER]
"""
import json, os, random, sys
import pyarrow as pa
import pyarrow.parquet as pq

out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "../tests/golden/parquet")
os.makedirs(out, exist_ok=True)
draw = random.Random(7)
WORDS = ["moss", "granite", "façade", "水", "a \"quoted\" word", "line\nbreak", "", "x" * 70]


def words(least, most):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


rows = []
for i in range(300):
    n = draw.choice([3, 4, 4, 4, 5])
    rows.append({
        "id": f"row-{i}", "question": words(1, 6), "kind": draw.choice(["one", "two", "three"]),
        "choices": {"text": [words(0, 2) for _ in range(n)], "label": list("ABCDE")[:n]}, "answerKey": draw.choice("ABC"),
        "label": draw.randint(-3, 10**12), "small": draw.choice([None, -5, 70000]),
        "endings": draw.choice([None, [], ["only"], ["a", None, words(1, 3)]])})
schema = pa.schema([
    ("id", pa.string()), ("question", pa.string()), ("kind", pa.string()),
    ("choices", pa.struct([("text", pa.list_(pa.string())), ("label", pa.list_(pa.string()))])), ("answerKey", pa.string()),
    ("label", pa.int64()), ("small", pa.int32()), ("endings", pa.list_(pa.string())), ("real", pa.float64())])
table = pa.Table.from_pylist([{**r, "real": 0.5} for r in rows], schema=schema)
FILES = {"hub": {"compression": "snappy", "row_group_size": 128},
         "pages": {"compression": "snappy", "data_page_version": "2.0", "data_page_size": 512, "write_batch_size": 16},
         "plain": {"compression": "none", "use_dictionary": False, "data_page_size": 512, "write_batch_size": 16}}
for name, options in FILES.items():
    pq.write_table(table, f"{out}/{name}.parquet", **options)
pq.write_table(table.slice(0, 20), f"{out}/zstd.parquet", compression="zstd")
with open(f"{out}/rows.jsonl", "w", encoding="utf-8") as f:
    for r in rows:  # a list that is absent reads as an empty one
        f.write(json.dumps({**r, "endings": r["endings"] or []}, ensure_ascii=False, sort_keys=True) + "\n")
