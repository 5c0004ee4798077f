#!/usr/bin/env python3
"""PEFT's training step on one CUDA device at Llama-2-7B's shape: the peer beside `mixlora-bench bench`.

usage: bench_peft.py [--shapes 8x512,16x128] [--methods lora,dora] [--modes shipped,compiled] [--steps 6] [--score]
needs torch, transformers, peft and a CUDA device

Random bf16 weights, r 16 on all seven projections, dropout 0.05, AdamW (fused), sequences of one length without
padding, SDPA. Modes: `shipped`, adapters in float32 under bf16 autocast, as PEFT makes them; `compiled`, adapters in
bf16 under torch.compile; `checkpointed`, shipped with gradient checkpointing. A line a run: median milliseconds of a
step after the first two, tokens/s, peak GiB. --score times the forward pass of the bare base model instead.
"""
import argparse
import gc
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def adapted(method, mode):
    model = get_peft_model(
        base_model(),
        LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, use_dora=method == "dora"))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16 if mode == "compiled" else torch.float32)
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return torch.compile(model) if mode == "compiled" else model


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def train(method, mode, sequences, length, steps):
    model = adapted(method, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    tokens = torch.randint(0, 32000, (sequences, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode != "compiled"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        if step >= 2:
            times.append(time.perf_counter() - start)
    return median(times), torch.cuda.max_memory_allocated() / 2**30


def score(sequences, length, steps):
    model = base_model().eval()
    tokens = torch.randint(0, 32000, (sequences, length), device="cuda")
    times = []
    with torch.no_grad():
        for step in range(steps + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=tokens, logits_to_keep=1)
            torch.cuda.synchronize()
            if step >= 2:
                times.append(time.perf_counter() - start)
    return median(times), torch.cuda.max_memory_allocated() / 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8x512,16x128")
    parser.add_argument("--methods", default="lora,dora")
    parser.add_argument("--modes", default="shipped,compiled")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--score", action="store_true")
    args = parser.parse_args()
    import peft
    import transformers
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}", flush=True)
    for shape in args.shapes.split(","):
        sequences, length = map(int, shape.split("x"))
        runs = [("base", "forward")] if args.score else [
            (method, mode) for method in args.methods.split(",") for mode in args.modes.split(",")]
        for method, mode in runs:
            try:
                seconds, gib = score(sequences, length, args.steps) if args.score else train(
                    method, mode, sequences, length, args.steps)
                print(f"{shape} {method} {mode}: {1000 * seconds:.1f} ms, {sequences * length / seconds:.0f} tokens/s, "
                      f"{gib:.1f} GiB", flush=True)
            except torch.OutOfMemoryError:
                print(f"{shape} {method} {mode}: out of memory", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
