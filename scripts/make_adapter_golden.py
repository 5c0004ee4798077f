#!/usr/bin/env python3
"""Golden of PEFT reading this project's own adapter files: logits, float32 on the CPU.

usage: make_adapter_golden.py [--out tests/golden]
needs torch, transformers, peft, safetensors (not needed to build or to test)

Reads adapter-lora/ and adapter-dora/, which the engine's tests write with MIXLORA_APPROVE=1, refuses them unless PEFT
finds every tensor it expects and no other, and writes adapter-logits.json.
"""
import argparse
import json
import os

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForCausalLM


@torch.no_grad()
def logits(out, name, ids):
    base = LlamaForCausalLM.from_pretrained(os.path.join(out, "tiny-llama"), dtype=torch.float32).eval()
    folder = os.path.join(out, "adapter-" + name)
    model = PeftModel.from_pretrained(base, folder).eval()
    ours, theirs = load_file(os.path.join(folder, "adapter_model.safetensors")), get_peft_model_state_dict(model)
    assert sorted(ours) == sorted(theirs), set(ours) ^ set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    return [float(f"{x:.8g}") for x in model(input_ids=torch.tensor([ids])).logits[0].flatten().tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tests/golden")
    options = parser.parse_args()
    ids = [3 + (17 + 31 * t) % 157 for t in range(12)]
    with open(os.path.join(options.out, "adapter-logits.json"), "w") as f:
        json.dump({"ids": ids, **{n: logits(options.out, n, ids) for n in ("lora", "dora")}}, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
