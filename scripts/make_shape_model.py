#!/usr/bin/env python3
"""Writes a Hugging Face directory of Llama-2-7B's shape with random bf16 weights, in shards as published ones are.

usage: make_shape_model.py OUTPUT_DIRECTORY [--layers N] [--shard-gb G]
  --layers N    of 32; fewer make a smaller file of the same matrices
  --shard-gb G  largest size of a shard (5, as transformers cuts them)

For measuring how fast a model of this size is read (the shape "shape:llama-2-7b" reads no file). Needs numpy.
"""
import argparse
import json
import os
import struct

import numpy as np

import tensor_file

HIDDEN, FFN, VOCAB, HEADS = 4096, 11008, 32000, 32
DTYPE = "BF16"


def tensors(layers):
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            yield f"{at}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}mlp.gate_proj.weight", (FFN, HIDDEN)
        yield f"{at}mlp.up_proj.weight", (FFN, HIDDEN)
        yield f"{at}mlp.down_proj.weight", (HIDDEN, FFN)
        yield f"{at}input_layernorm.weight", (HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def shards(layers, most):
    """name -> shape by shards, each at most `most` bytes."""
    all_shards, size = [{}], 0
    for name, shape in tensors(layers):
        own = tensor_file.size_of(shape, DTYPE)
        if all_shards[-1] and size + own > most:
            all_shards.append({})
            size = 0
        all_shards[-1][name] = shape
        size += own
    return all_shards


def pieces(shape, block):
    """A norm's weights: 1. A matrix: the block, again and again."""
    if len(shape) == 1:
        yield struct.pack("<H", 0x3F80) * shape[0]
        return
    left = tensor_file.size_of(shape, DTYPE)
    while left > 0:
        yield block[:left]
        left -= min(left, len(block))


def main():
    arguments = argparse.ArgumentParser(usage=__doc__)
    arguments.add_argument("directory")
    arguments.add_argument("--layers", type=int, default=32)
    arguments.add_argument("--shard-gb", type=float, default=5)
    a = arguments.parse_args()
    os.makedirs(a.directory)
    numbers = np.random.default_rng(1).standard_normal(1 << 23, dtype=np.float32) / np.float32(64)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "max_position_embeddings": 4096, "num_attention_heads": HEADS,
        "num_hidden_layers": a.layers, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": VOCAB,
    }
    with open(os.path.join(a.directory, "config.json"), "w") as out:
        json.dump(config, out, indent=2)
    parts, where = shards(a.layers, a.shard_gb * 1e9), {}
    for i, shard in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        tensor_file.write(os.path.join(a.directory, name), DTYPE, shard, lambda tensor: pieces(shard[tensor], block))
        where.update(dict.fromkeys(shard, name))
    size = sum(tensor_file.size_of(shape, DTYPE) for shard in parts for shape in shard.values())
    with open(os.path.join(a.directory, "model.safetensors.index.json"), "w") as out:
        json.dump({"metadata": {"total_size": size}, "weight_map": where}, out)
    print(f"{a.directory}: {size / 1e9:.1f} GB in {len(parts)} shards")


if __name__ == "__main__":
    main()
