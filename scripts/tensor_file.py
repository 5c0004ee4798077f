"""Writes safetensors files; what the scripts that make models share."""
import json
import struct

BYTES = {"F32": 4, "BF16": 2}  # of a number


def size_of(shape, dtype):
    """Bytes of a tensor."""
    size = BYTES[dtype]
    for n in shape:
        size *= int(n)
    return size


def write(path, dtype, shapes, pieces_of):
    """The header's length, the header, the numbers: of shapes (name -> shape, in their order) what pieces_of(name) gives."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = at + size_of(shape, dtype)
        header[name] = {"dtype": dtype, "shape": [int(n) for n in shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            for piece in pieces_of(name):
                out.write(piece)
