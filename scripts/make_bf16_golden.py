#!/usr/bin/env python3
"""How far torch's bf16 is from its float32 over 20 steps of LoRA on SmolLM2-135M: what our bf16 is held against.

Needs torch, transformers, peft.  make_bf16_golden.py MODEL OUT.json
The first 24 rows of the starter question suite, two a step, no dropout. In bf16 the weights, activations and the adapter that
computes are bf16, AdamW and its master weights float32. OUT.json: {"float32": [loss of each step], "bfloat16": [...]}.
"""
import json, os, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = os.path.join(os.path.dirname(__file__), "../suites/starter/starter-question/train.jsonl")
STEPS, ITEMS, BATCH = 20, 24, 2


def losses(model, items, dtype, start):
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    lm = get_peft_model(lm, config, autocast_adapter_dtype=False)
    trained = {name: p for name, p in lm.named_parameters() if "lora_" in name}
    if not start:
        start.update({name: p.detach().float().clone() for name, p in trained.items()})
    master = {name: start[name].clone() for name in trained}
    adamw, all_losses = torch.optim.AdamW(master.values(), lr=2e-4), []
    for step in range(STEPS):
        for name, p in trained.items():
            p.data, p.grad = master[name].to(dtype), None
        batch = [items[(step * BATCH + i) % ITEMS] for i in range(BATCH)]
        tokens, loss = sum(ids.shape[1] - 1 for ids in batch), 0.0
        for ids in batch:
            logits = lm(ids).logits[0, :-1].float()
            part = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / tokens
            part.backward()
            loss += part.item()
        for name, p in trained.items():
            master[name].grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        adamw.step()
        all_losses.append(loss)
    return all_losses


def main(model, out):
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(ROWS, encoding="utf-8") as f:
        texts = [json.dumps(json.loads(f.readline()), separators=(",", ":"), sort_keys=True, ensure_ascii=False)
                 for _ in range(ITEMS)]
    items = [tokenizer(t, return_tensors="pt").input_ids for t in texts]
    start = {}
    found = {str(t).removeprefix("torch."): losses(model, items, t, start) for t in (torch.float32, torch.bfloat16)}
    with open(out, "w") as f:
        json.dump({"torch": torch.__version__, **found}, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
