#!/usr/bin/env python3
"""Writes engine/unicode_tables.h: code point ranges of letters (L*) and numbers (N*).

needs unicodedata2==16.0.0: the Unicode that the tokenizers package's patterns know (0.23)
"""
import sys

import unicodedata2 as unicodedata


def ranges(kind):
    out, start = [], None
    for c in range(0x110001):
        inside = c < 0x110000 and unicodedata.category(chr(c))[0] == kind
        if inside and start is None:
            start = c
        if not inside and start is not None:
            out.append((start, c - 1))
            start = None
    return out


def table(name, pairs):
    cells = [f"{{0x{a:x}, 0x{b:x}}}" for a, b in pairs]
    lines = [", ".join(cells[i : i + 5]) for i in range(0, len(cells), 5)]
    return f"inline constexpr CodeRange {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


with open(sys.argv[1], "w", encoding="ascii") as f:
    f.write(f"// Unicode {unicodedata.unidata_version}: made by scripts/make_unicode.py, not by hand.\n#pragma once\n\nnamespace mixlora {{\n\n"
            "struct CodeRange {\n  char32_t first, last;\n};\n// clang-format off\n"
            + table("kLetters", ranges("L")) + table("kNumbers", ranges("N")) + "// clang-format on\n\n}  // namespace mixlora\n")
