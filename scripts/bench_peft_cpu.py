#!/usr/bin/env python3
"""Times LoRA or DoRA training of PEFT on torch's CPU, on the batches that `mixlora-bench bench --batches FILE` wrote.

usage: bench_peft_cpu.py --model models/smollm2-135m --batches FILE [--dora] [--threads N] [--dtypes fp32,bf16]
Needs torch, transformers, peft. Rank 16, alpha 32, dropout 0.05, all seven projections, AdamW: the bench's own numbers.
A batch is padded to its longest text, as PEFT's users do; tokens/s counts the real tokens. Scoring is the base
model's forward under no_grad with the head on the last row only, what transformers' logits_to_keep=1 gives.
"""
import argparse
import json
import os
import statistics
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", required=True)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--seconds", type=float, default=60, help="stop a type's steps after this long (two at least)")
    args = parser.parse_args()

    import peft
    import torch
    import transformers
    torch.set_num_threads(args.threads)
    steps = json.load(open(args.batches))["steps"]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
          f"{args.threads} threads")

    def padded(texts):
        longest = max(map(len, texts))
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
        return ids, mask

    for name in args.dtypes.split(","):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        torch.manual_seed(42)
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
        config = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, use_dora=args.dora, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        # bf16: adapters in bf16 too (autocast_adapter_dtype off), the faster way on a CPU.
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
        per_token, begin = [], time.perf_counter()
        for at, texts in enumerate(steps):
            ids, mask = padded(texts)
            start = time.perf_counter()
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = loss.item()
            took = time.perf_counter() - start
            if at > 0:  # the first one warms up
                per_token.append(1000 * took / sum(map(len, texts)))
            if len(per_token) >= 2 and time.perf_counter() - begin > args.seconds:
                break
        model.eval()
        scored, took = 0, 0.0
        with torch.no_grad():
            for at, texts in enumerate(steps[:4]):
                ids, mask = padded(texts)
                start = time.perf_counter()
                model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
                if at > 0:
                    took += time.perf_counter() - start
                    scored += sum(map(len, texts))
        ms = statistics.median(per_token)
        print(f"{'DoRA' if args.dora else 'LoRA'} {name}: {1000 / ms:.0f} tokens/s training ({ms:.3f} ms/token, median of "
              f"{len(per_token)} steps), {scored / took:.0f} tokens/s scoring", flush=True)
        del model, base, optimizer


main()
