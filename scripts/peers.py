#!/usr/bin/env python3
"""Puts PEFT's and transformers' figures beside ours, of one run of gpu.sh on one device.

usage: peers.py FOLDER    of bench-SHAPE/bench.json (mixlora-bench bench --out) and peft.txt (bench_peft.py's lines)
"""
import json
import pathlib
import re
import sys


def ours(folder):
    """(shape, method) -> the row of the bench table as {column: value}."""
    out = {}
    for path in sorted(folder.glob("bench-*/bench.json")):
        table = json.loads(path.read_text())
        for row in table["rows"]:
            cells = row["cells"]
            values = {c: cell.get("value") for c, cell in zip(table["columns"], cells)}  # the first "share %" is hidden
            out[path.parent.name.removeprefix("bench-"), cells[0]["text"]] = values
    return out


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    peers = folder / "peft.txt"
    if not peers.exists():
        sys.exit(f"{peers}: no such file; run the stages bench and peft into this folder first")
    mine = ours(folder)
    lines = ["| tokens a step | method | tokens/s | GiB | peer | its tokens/s | its GiB | times |", "|---|---|---:|---:|---|---:|---:|---:|"]
    for line in peers.read_text().splitlines():
        found = re.fullmatch(r"(\S+) (\S+) (\S+): [\d.]+ ms, (\d+) tokens/s, ([\d.]+) GiB", line)
        if not found:
            continue
        shape, method, mode, speed, gib = found.groups()
        if mode == "forward":  # scoring, of the bare base model, beside that of every method at the nearest shape
            for (at, name), row in mine.items():
                if at == "8x512" and row["scoring tokens/s"]:
                    lines.append(f"| scoring | {name} | {row['scoring tokens/s']:.0f} | | transformers, base model, {shape} | {speed} | {gib} "
                                 f"| {row['scoring tokens/s'] / float(speed):.2f} |")
            continue
        row = mine.get((shape, method))
        if row is None:
            continue
        lines.append(f"| {shape} | {method} | {row['tokens/s']:.0f} | {row['measured MiB'] / 1024:.1f} | PEFT {mode} | {speed} | {gib} "
                     f"| {row['tokens/s'] / float(speed):.2f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
