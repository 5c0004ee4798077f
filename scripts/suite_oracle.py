#!/usr/bin/env python3
"""Answers of lm-evaluation-harness and of a plain transformers script, to compare a store of ours with.

Needs torch, transformers, datasets and lm-eval 0.4.x. Rows come from MIXLORA_DATA; no data is downloaded.
  suite_oracle.py texts BINARY                      every loglikelihood request of `prompts`, all rows, against lm-eval's
  suite_oracle.py scores MODEL OUT.json ROWS [SUITE...]
                                                    both protocols' log-probabilities of each suite's first rows, the model in float32, softmax in float64;
                                                    what OUT.json has already stays and is not asked again
  suite_oracle.py compare OUT.json STORE.db         item by item; exit 1 when an answer or a log-probability differs too much
  suite_oracle.py judge MODEL OUT.json STORE.db SUITE LEAST
                                                    loglikelihoods that differ by LEAST or more, both beside float64's
The store comes of a sweep that asks the base model both protocols in fp32 with the same limit.
"""
import gzip, json, os, sqlite3, subprocess, sys, tempfile

DATA = os.environ.get("MIXLORA_DATA", "data")
# name: folder, split, lm-eval task
SUITES = {"arc-e": ("arc_easy", "test", "arc_easy"), "arc-c": ("arc_challenge", "test", "arc_challenge"),
          "boolq": ("boolq", "validation", "boolq"), "obqa": ("openbookqa", "test", "openbookqa"),
          "piqa": ("piqa", "validation", "piqa"), "siqa": ("social_iqa", "validation", "social_iqa"),
          "hellaswag": ("hellaswag", "validation", "hellaswag"), "winogrande": ("winogrande", "validation", "winogrande")}
HEADLINE = {"arc-e": "acc", "arc-c": "acc_norm", "boolq": "acc", "obqa": "acc_norm", "piqa": "acc", "siqa": "acc",
            "hellaswag": "acc_norm", "winogrande": "acc"}
WIKIHOW = {"Cars & Other Vehicles", "Computers and Electronics", "Education and Communications", "Family Life",
           "Finance and Business", "Food and Entertaining", "Health", "Holidays and Traditions", "Home and Garden",
           "Home,Categories", "Personal Care and Style", "Pets and Animals", "Philosophy and Religion", "Relationships",
           "Sports and Fitness", "Travel", "Uncategorized", "Work World", "Youth"}


def rows_of(name, limit=None):
    folder, split, _ = SUITES[name]
    with gzip.open(f"{DATA}/{folder}/{split}.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return rows[:limit]


def original(name, r):
    """A row with the official data set's fields."""
    import re
    c, q, a = r["choices"], r["question"], r["answer"]
    if name in ("arc-e", "arc-c"):
        return {"id": r["id"], "question": q, "choices": {"text": c, "label": r["labels"]}, "answerKey": r["labels"][a]}
    if name == "obqa":
        return {"id": r["id"], "question_stem": q, "choices": {"text": c, "label": r["labels"]}, "answerKey": r["labels"][a]}
    if name == "boolq":
        return {"passage": r["context"], "question": q, "label": a}
    if name == "piqa":
        return {"goal": q, "sol1": c[0], "sol2": c[1], "label": a}
    if name == "siqa":
        return {"context": r["context"], "question": q, "answerA": c[0], "answerB": c[1], "answerC": c[2], "label": str(a + 1)}
    if name == "winogrande":
        return {"sentence": q, "option1": c[0], "option2": c[1], "answer": str(a + 1)}
    ends = list(re.finditer(r"[.!?][\"')]*\s+", q))
    at = len(q) if r["context"] in WIKIHOW or not ends else ends[-1].end()
    return {"activity_label": r["context"], "ctx_a": q[:at], "ctx_b": q[at:], "endings": c, "label": str(a)}


def task_of(name, rows):
    """lm-eval's own task over our rows."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    split = SUITES[name][1]
    lm_task = SUITES[name][2]

    def local(self, *args, **kwargs):
        d = datasets.Dataset.from_list([original(name, r) for r in rows])
        self.dataset = datasets.DatasetDict({"train": d, "validation": d, "test": d})

    ConfigurableTask.download = local
    task = TaskManager().load([lm_task])["tasks"][lm_task]
    docs = list(task.test_docs() if task.has_test_docs() else task.validation_docs())
    assert len(docs) == len(rows), (name, split)
    return task, docs


def requests_of(name, rows):
    task, docs = task_of(name, rows)
    for doc in docs:
        context = task.fewshot_context(doc, 0)
        yield [i.args for i in task.construct_requests(doc, context, metadata=(name, 0, 1), doc_id=0)]


def texts(binary):
    bad = 0
    for name in SUITES:
        rows = rows_of(name)
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
            subprocess.run([binary, "prompts", name, "--protocol", "loglikelihood", "--out", out.name], check=True,
                           stdout=subprocess.DEVNULL)
            ours = [json.loads(line) for line in open(out.name, encoding="utf-8")]
        differ = [row["id"] for row, theirs in zip(ours, requests_of(name, rows))
                  if [(p["context"], p["continuation"]) for p in row["requests"]] != [tuple(t) for t in theirs]]
        print(f"{name}: {len(ours)} rows, {len(differ)} differ {differ[:3]}", flush=True)
        bad += len(differ) + (len(ours) != len(rows))
    return 1 if bad else 0


def scores(model, out, limit, suites):
    import time, torch
    from lm_eval.models.huggingface import HFLM
    # With torch's log_softmax in float32 a long continuation comes out up to 2e-3 too high; lm-eval has an option for it.
    lm = HFLM(pretrained=model, dtype="float32", softmax_dtype="float64", device="cpu", batch_size=16)
    answers = json.load(open(out)) if os.path.exists(out) else {}
    for name in suites or SUITES:
        if name in answers:
            continue
        rows = rows_of(name, limit)
        from lm_eval.api.instance import Instance
        asked = [list(map(tuple, r)) for r in requests_of(name, rows)]
        flat = [Instance(request_type="loglikelihood", doc={}, arguments=a, idx=0) for r in asked for a in r]
        start = time.monotonic()
        values, at = [v for v, _ in lm.loglikelihood(flat, disable_tqdm=True)], 0
        seconds = time.monotonic() - start
        answers[name] = {}
        for r, a in zip(rows, asked):
            lls, at = values[at:at + len(a)], at + len(a)
            answers[name][r["id"]] = {"loglikelihood": lls}
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as f:
            subprocess.run([os.environ.get("MIXLORA_BENCH", "build/cpu/mixlora-bench"), "prompts", name, "--out", f.name],
                           check=True, stdout=subprocess.DEVNULL)
            for line in list(open(f.name, encoding="utf-8"))[:len(rows)]:
                p = json.loads(line)
                ids = lm.tokenizer(p["requests"][0]["context"]).input_ids
                labels = [lm.tokenizer(" " + q["continuation"], add_special_tokens=False).input_ids[-1] for q in p["requests"]]
                with torch.no_grad():
                    logits = lm.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()[labels]
                answers[name][p["id"]]["label-token"] = torch.log_softmax(logits, -1).tolist()
        print(f"{name}: {len(rows)} rows; lm-eval's loglikelihood took {seconds:.1f} s, {torch.get_num_threads()} threads", flush=True)
        with open(out, "w") as f:
            json.dump(answers, f)
    return 0


def clean_choice(name, choice):
    if name != "hellaswag":
        return choice
    from lm_eval.tasks.hellaswag.utils import preprocess
    return preprocess(choice)


def compare(file, store):
    """A table of items, differing answers and differences; every differing answer with how near a tie it is to both."""
    theirs, db, bad, ties = json.load(open(file)), sqlite3.connect(store), 0, []
    print("| suite | protocol | rows | differing answers | largest difference of a log-probability |\n|---|---|---|---|---|")
    for name, items in theirs.items():
        choices = {r["id"]: [len(clean_choice(name, c)) for c in r["choices"]] for r in rows_of(name, len(items))}
        for protocol in ("loglikelihood", "label-token"):
            found = {i: (c, json.loads(p)) for i, c, p in db.execute(
                "SELECT item, choice, log_probs FROM answer WHERE suite = ? AND protocol = ?", (name, protocol))}
            differ, most = 0, 0.0
            for item, t in items.items():
                choice, probs = found[item]
                most = max(most, *(abs(a - b) for a, b in zip(probs, t[protocol], strict=True)))
                by_length = protocol == "loglikelihood" and HEADLINE[name] == "acc_norm"
                score = [x / n for x, n in zip(t[protocol], choices[item] if by_length else [1] * len(probs))]
                expected = score.index(max(score))
                if choice != expected:
                    differ += 1
                    ties.append(f"{name}, {protocol}, {item}: {expected} here, {choice} ours, "
                                f"{score[expected] - score[choice]:.1e} apart here")
            print(f"| {name} | {protocol} | {len(items)} | {differ} | {most:.1e} |")
            bad += most > 1e-3 or differ * 1000 > max(len(items), 1000)
    print("\n".join(["", *ties]) if ties else "\nNo answer differs.")
    return 1 if bad else 0


def in_float64(model):
    """The model in float64 throughout: transformers keeps norms and angles in float32 whatever the weights are."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers.models.llama import modeling_llama as llama

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self, x, position_ids):
        c = self.config
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        rope = getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta}
        freq = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        a = position_ids[0].double()[:, None] * freq
        a = torch.cat([a, a], -1)[None]
        return a.cos(), a.sin()

    llama.LlamaRMSNorm.forward, llama.LlamaRotaryEmbedding.forward = norm, angles
    return HFLM(pretrained=model, dtype="float64", device="cpu", batch_size=4)


def judge(model, file, store, name, least):
    """How far both sides' loglikelihoods are from float64's, where they are far from each other."""
    from lm_eval.api.instance import Instance
    theirs = json.load(open(file))[name]
    ours = {i: json.loads(p) for i, p in sqlite3.connect(store).execute(
        "SELECT item, log_probs FROM answer WHERE suite = ? AND protocol = 'loglikelihood'", (name,))}
    rows = rows_of(name, len(theirs))
    asked = [(r["id"], c, a) for r, requests in zip(rows, requests_of(name, rows)) for c, a in enumerate(requests)
             if abs(ours[r["id"]][c] - theirs[r["id"]]["loglikelihood"][c]) >= float(least)]
    lm = in_float64(model)
    values = lm.loglikelihood([Instance(request_type="loglikelihood", doc={}, arguments=tuple(a), idx=0) for _, _, a in asked],
                              disable_tqdm=True)
    print("| item | choice | float64 | OUT.json off by | ours off by |\n|---|---|---|---|---|")
    for (item, c, _), (exact, _) in zip(asked, values):
        print(f"| {item} | {c} | {exact:.4f} | {theirs[item]['loglikelihood'][c] - exact:.1e} | {ours[item][c] - exact:.1e} |")
    return 0


if __name__ == "__main__":
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "texts":
        sys.exit(texts(rest[0]))
    if what == "scores":
        sys.exit(scores(rest[0], rest[1], int(rest[2]), rest[3:]))
    sys.exit(judge(*rest) if what == "judge" else compare(*rest))
