#!/usr/bin/env python3
"""Goldens of transformers and PEFT, float32 on the CPU: logits of a real model, logits and training of a tiny one.

usage: make_golden.py [--model models/smollm2-135m] [--out tests/golden]
needs torch, transformers, peft, tokenizers, safetensors (not needed to build or to test)

Writes logits.json (the real model), tiny-llama/ (a random model as a Hugging Face directory), tiny-llama.json (its
logits), peft-lora/ and peft-dora/ (the adapters that training starts from, in PEFT's own files) and peft.json (20
AdamW losses of each, and the logits of the model with the adapter it starts from).
"""
import argparse
import json
import os
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = [
    "The mitochondria is often called the powerhouse of the cell, because it turns the energy of food into a form that "
    "the rest of the cell can spend.",
    "Question: Which of these materials conducts electricity best?\nA. glass\nB. copper\nC. rubber\nD. dry wood\n"
    "Answer: B",
    "In 1969, two people walked on the Moon for 2 hours and 31 minutes; 21.5 kg of rock came home with them.",
    "def mean(numbers):\n    total = 0\n    for x in numbers:\n        total += x\n    return total / len(numbers)\n"
    "# caf\u00e9, na\u00efve, \u6771\u4eac",
]
TOP, COLUMNS, STEPS = 20, 64, 20
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def digits(tensor):
    return [float(f"{x:.8g}") for x in tensor.flatten().tolist()]


def write(path, value):
    with open(path, "w") as f:
        json.dump(value, f, separators=(",", ":"))
        f.write("\n")


def load(directory):
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def real_logits(directory, out):
    tokenizer, model = Tokenizer.from_file(os.path.join(directory, "tokenizer.json")), load(directory)
    vocab = model.config.vocab_size
    columns = [(i * vocab) // COLUMNS for i in range(COLUMNS)]
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        logits = model(torch.tensor([ids])).logits[0]
        top = logits.topk(TOP, dim=1)
        texts.append({"text": text, "ids": ids, "rms": logits.double().pow(2).mean().sqrt().item(),
                      "top": top.indices.flatten().tolist(), "top_logits": digits(top.values),
                      "column_logits": digits(logits[:, columns])})
    write(os.path.join(out, "logits.json"), {"columns": columns, "texts": texts})


def make_tiny(directory):
    """Random weights that bfloat16 holds, stored as bfloat16: both sides start from the same numbers."""
    torch.manual_seed(11)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, vocab_size=160, max_position_embeddings=64,
                         rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=1,
                         eos_token_id=2)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = 1 + 0.1 * torch.randn_like(p)
        else:
            p.data = torch.randn_like(p) * (1.0 if "embed" in name else p.shape[1] ** -0.5)
    os.makedirs(directory, exist_ok=True)
    save_file({name: p.data.bfloat16().contiguous() for name, p in model.named_parameters()},
              os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    keys = ["hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
            "tie_word_embeddings", "bos_token_id", "eos_token_id"]
    values = {key: getattr(config, key) for key in keys}
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10000.0, **values}, f,
                  indent=1)
        f.write("\n")


def sequences():
    """Eight texts of 5 to 26 tokens with something to learn: runs that count up by a stride of their own."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(8):
        start, stride = torch.randint(3, 160, (2,), generator=generator).tolist()
        made.append([3 + (start + stride * t) % 157 for t in range(5 + 3 * i)])
    return made


def batch_loss(model, items):
    """Mean over all next-token positions of the whole batch; padding is masked and counts for nothing."""
    longest = max(map(len, items))
    ids = torch.tensor([x + [0] * (longest - len(x)) for x in items])
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in items])
    logits = model(input_ids=ids, attention_mask=mask).logits
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def peft_run(tiny, out, dora, items):
    torch.manual_seed(3)
    name = "dora" if dora else "lora"
    model = get_peft_model(load(tiny), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0,
                                                  target_modules=PROJECTIONS, use_dora=dora))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for key, p in model.named_parameters():
        if "lora_B" in key:  # not PEFT's zeros: A's gradient and DoRA's norm count from the first step on
            p.data = 0.02 * torch.randn_like(p)
    adapter = os.path.join(out, f"peft-{name}")
    shutil.rmtree(adapter, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "tests/golden/tiny-llama"
    model.save_pretrained(adapter)
    if os.path.exists(os.path.join(adapter, "README.md")):
        os.remove(os.path.join(adapter, "README.md"))
    config = os.path.join(adapter, "adapter_config.json")
    with open(config) as f:
        values = json.load(f)
    values["target_modules"].sort()  # PEFT writes a set, in any order
    with open(config, "w") as f:
        json.dump(values, f, indent=1)
        f.write("\n")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([items[2]])).logits[0]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = batch_loss(model, items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"trainable": sum(p.numel() for p in trainable), "logits": digits(logits), "losses": losses}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--out", default="tests/golden")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    os.makedirs(options.out, exist_ok=True)
    real_logits(options.model, options.out)
    tiny = os.path.join(options.out, "tiny-llama")
    make_tiny(tiny)
    items = sequences()
    with torch.no_grad():
        logits = load(tiny)(torch.tensor([items[5]])).logits[0]
    write(os.path.join(options.out, "tiny-llama.json"), {"ids": items[5], "logits": digits(logits)})
    write(os.path.join(options.out, "peft.json"),
          {"sequences": items, "r": 4, "lora_alpha": 8, "lr": 1e-3, "weight_decay": 0.01, "logits_of": 2,
           "lora": peft_run(tiny, options.out, False, items), "dora": peft_run(tiny, options.out, True, items)})


if __name__ == "__main__":
    main()
