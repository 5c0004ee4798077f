#!/usr/bin/env python3
"""MixLoRA and MixDoRA in float64, written from the equations alone: goldens for forward, gradients and router losses.

usage: mixlora_oracle.py [GOLDEN_DIRECTORY]      needs numpy, torch, safetensors; default tests/golden

Writes mixlora-model/ (a tiny two-layer Llama as a Hugging Face directory) and mixlora.json: for every router and
method the adapter's numbers, the logits, the loss, the router losses and the gradient of every trainable tensor.
The experts are computed one after the other, each with its own down projection, as the paper writes them
(arXiv 2404.15159, equations 4-8); nothing is shared with the engine's way of computing them once.
"""
import json
import os
import sys

import numpy as np
import torch
from safetensors.numpy import save_file

torch.set_default_dtype(torch.float64)

LAYERS, D, F, V, HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 2, 12, 20, 24, 2, 1, 6, 1e-5, 10000.0
E, K, R, ALPHA = 4, 2, 3, 6
TOP_P, CAPACITY, AUX_COEF, Z_COEF = 0.7, 1, 0.05, 0.03
SEQUENCES = [[3, 17, 9, 22], [11, 5, 20]]
SIZES = {"q_proj": (HEADS * HEAD_DIM, D), "k_proj": (KV_HEADS * HEAD_DIM, D), "v_proj": (KV_HEADS * HEAD_DIM, D),
         "o_proj": (D, HEADS * HEAD_DIM), "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def numbers(rng, *shape, size=1.0):
    """Normal numbers that float32 holds exactly, so that both sides start from the same ones."""
    return rng.normal(0, size, shape).astype(np.float32)


def make_model(rng):
    model = {"model.embed_tokens.weight": numbers(rng, V, D), "lm_head.weight": numbers(rng, V, D, size=0.3),
             "model.norm.weight": 1 + numbers(rng, D, size=0.1)}
    for i in range(LAYERS):
        for p, (out, inner) in SIZES.items():
            block = "self_attn" if p in ATTENTION else "mlp"
            model[f"model.layers.{i}.{block}.{p}.weight"] = numbers(rng, out, inner, size=inner**-0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model[f"model.layers.{i}.{norm}.weight"] = 1 + numbers(rng, D, size=0.1)
    return model


def make_adapter(rng, model, dora):
    adapter = {}
    for i in range(LAYERS):
        for p, (out, inner) in SIZES.items():
            attention = p in ATTENTION
            block = "self_attn" if attention else "mlp"
            for e in [None] if attention else range(E):
                at = f"mixlora.layers.{i}.{block}.{p}." + ("" if e is None else f"experts.{e}.")
                adapter[at + "lora_A.weight"] = numbers(rng, R, inner, size=inner**-0.5)
                adapter[at + "lora_B.weight"] = numbers(rng, out, R, size=0.3)
                if dora:
                    rows = np.linalg.norm(model[f"model.layers.{i}.{block}.{p}.weight"], axis=1)
                    adapter[at + "lora_magnitude_vector"] = (rows * (1 + numbers(rng, out, size=0.1))).astype(np.float32)
        adapter[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = numbers(rng, E, D, size=0.5)
    return adapter


def adapted(x, weight, adapter, at):
    """y = c (W x + s B A x), c = m / |W + s B A| by row, the norm held constant; c = 1 without magnitudes."""
    a, b, m = (adapter.get(at + leaf) for leaf in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    updated = weight + ALPHA / R * b @ a
    y = x @ updated.T
    return y if m is None else y * (m / updated.norm(dim=1).detach())


def rmsnorm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x):
    """x (T, heads, HEAD_DIM): halves turn together by position times THETA^(-2 j / HEAD_DIM)."""
    half = HEAD_DIM // 2
    angle = torch.arange(x.shape[0])[:, None] * THETA ** (-torch.arange(half) * 2 / HEAD_DIM)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(x, model, adapter, i):
    def project(name, inputs):
        return adapted(inputs, model[f"model.layers.{i}.self_attn.{name}.weight"], adapter,
                       f"mixlora.layers.{i}.self_attn.{name}.")
    rows = x.shape[0]
    q = rotated(project("q_proj", x).view(rows, HEADS, HEAD_DIM))
    k = rotated(project("k_proj", x).view(rows, KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, 1)
    v = project("v_proj", x).view(rows, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
    return project("o_proj", torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(rows, -1))


def choose(p, kind):
    """The chosen experts of one token and their weights."""
    order = p.argsort(descending=True)
    if kind == "mixlora":
        kept = order[:K]
        return kept.tolist(), p[kept] / p[kept].sum()
    if kind == "mixlora-switch":
        return order[:1].tolist(), p[order[:1]]
    count = int((p[order].cumsum(0) <= TOP_P).sum()) + 1
    return order[:min(count, E)].tolist(), p[order[:count]]


def expert(x, model, adapter, i, e):
    """The whole gated feed-forward of expert e; e None is the frozen one."""
    def project(name, inputs):
        weight = model[f"model.layers.{i}.mlp.{name}.weight"]
        if e is None:
            return inputs @ weight.T
        return adapted(inputs, weight, adapter, f"mixlora.layers.{i}.mlp.{name}.experts.{e}.")
    return project("down_proj", torch.nn.functional.silu(project("gate_proj", x)) * project("up_proj", x))


def feed_forward(x, model, adapter, i, kind, statistics):
    """x: the rows of one sequence. Adds (chosen, probabilities, logsumexp, over capacity) of each row to `statistics`."""
    logits = x @ adapter[f"mixlora.layers.{i}.mlp.moe_gate.weight"].T
    out, taken = [], [0] * E
    for row, logit in zip(x, logits):
        p = logit.softmax(0)
        chosen, weights = choose(p, kind)
        taken[chosen[0]] += 1
        over = kind == "mixlora-switch" and taken[chosen[0]] > CAPACITY
        statistics.append((chosen, p, logit.logsumexp(0), over))
        if over:
            out.append(expert(row, model, adapter, i, None))
        else:
            out.append(sum(w * expert(row, model, adapter, i, e) for e, w in zip(chosen, weights)))
    return torch.stack(out)


def router_loss(statistics, kind):
    """coef E sum_i F_i P_i over the rows of all layers together; z-loss for switch."""
    rows = len(statistics)
    share = torch.zeros(E)
    for chosen, *_ in statistics:
        for e in chosen:
            share[e] += 1 / rows
    mean = torch.stack([p for _, p, *_ in statistics]).mean(0)
    loss = AUX_COEF * E * (share * mean).sum()
    if kind == "mixlora-switch":
        loss = loss + Z_COEF * torch.stack([lse for _, _, lse, _ in statistics]).pow(2).mean()
    return loss


def run(model, adapter, kind):
    """Logits of every row, the mean next-token loss over all sequences together, the router losses."""
    statistics, logits, terms = [], [], []
    for tokens in SEQUENCES:
        x = model["model.embed_tokens.weight"][tokens]
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            x = x + attention(rmsnorm(x, model[at + "input_layernorm.weight"]), model, adapter, i)
            x = x + feed_forward(rmsnorm(x, model[at + "post_attention_layernorm.weight"]), model, adapter, i, kind,
                                 statistics)
        y = rmsnorm(x, model["model.norm.weight"]) @ model["lm_head.weight"].T
        logits.append(y)
        terms += [y[t].logsumexp(0) - y[t, tokens[t + 1]] for t in range(len(tokens) - 1)]
    return torch.cat(logits), torch.stack(terms).mean(), router_loss(statistics, kind), statistics


def digits(tensor):
    return [float(f"{x:.9g}") for x in tensor.detach().double().flatten().tolist()]


def case(model, rng, method, kind):
    adapter = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True)
               for name, x in make_adapter(rng, model, method == "mixdora").items()}
    frozen = {name: torch.tensor(x, dtype=torch.float64) for name, x in model.items()}
    logits, loss, aux, statistics = run(frozen, adapter, kind)
    (loss + aux).backward()
    if kind == "mixlora-dynamic":
        assert len({len(s[0]) for s in statistics}) > 1, "every row keeps equally many experts: choose another seed"
    if kind == "mixlora-switch":
        assert len({s[3] for s in statistics}) == 2, "no row, or every row, is over capacity: choose another seed"
    return {"method": method, "routing_strategy": kind, "logits": digits(logits), "loss": loss.item(), "aux": aux.item(),
            "adapter": {name: digits(x) for name, x in adapter.items()},
            "gradient": {name: digits(x.grad if x.grad is not None else torch.zeros_like(x))
                         for name, x in adapter.items()}}


def main():
    directory = sys.argv[1] if len(sys.argv) > 1 else "tests/golden"
    rng = np.random.default_rng(20240415)
    model = make_model(rng)
    where = os.path.join(directory, "mixlora-model")
    os.makedirs(where, exist_ok=True)
    save_file(model, os.path.join(where, "model.safetensors"), metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": D,
              "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
              "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 32,
              "rms_norm_eps": EPS, "rope_theta": THETA, "vocab_size": V, "tie_word_embeddings": False,
              "bos_token_id": 1, "eos_token_id": 2}
    with open(os.path.join(where, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
        f.write("\n")
    cases = [case(model, rng, method, kind) for method in ("mixlora", "mixdora")
             for kind in ("mixlora", "mixlora-dynamic", "mixlora-switch")]
    golden = {"num_experts": E, "top_k": K, "r": R, "lora_alpha": ALPHA, "top_p": TOP_P, "expert_capacity": CAPACITY,
              "router_aux_loss_coef": AUX_COEF, "router_z_loss_coef": Z_COEF, "sequences": SEQUENCES, "cases": cases}
    with open(os.path.join(directory, "mixlora.json"), "w") as f:
        json.dump(golden, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
