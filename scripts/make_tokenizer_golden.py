#!/usr/bin/env python3
"""Goldens of the tokenizers package: ids of real rows and of strings made to be hard, for three kinds of tokenizer.

usage: make_tokenizer_golden.py [--model models/smollm2-135m] [--data $MIXLORA_DATA] [--out tests/golden/tokenizer]
needs tokenizers (not needed to build or to test)

Trains llama2.json (BPE with byte fallback in Llama-2's configuration) and llama3.json (byte-level BPE with Llama-3's
pattern and ignore_merges) on the rows; the third kind is the model's own tokenizer.json. Writes rows.json (one digest
of the ids per 100 of 10,000 rows), strings.json (ids and decoded texts in full, also under variants of the
configuration) and splits.json (digests of the pre-tokenizers' cuts around every code point).
"""
import argparse
import gzip
import hashlib
import json
import os
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
ROWS = [("arc_easy/test", 1500), ("arc_challenge/train", 1100), ("boolq/validation", 1500), ("hellaswag/validation", 1500),
        ("openbookqa/train", 1400), ("piqa/train", 1500), ("social_iqa/train", 750), ("winogrande/train_m", 750)]
BLOCK, VOCAB, KINDS = 100, 4000, ("smollm2", "llama2", "llama3")


def write(path, value, **how):
    with open(path, "w", encoding="ascii") as f:
        json.dump(value, f, **how)
        f.write("\n")


def texts(data, name, count):
    with gzip.open(os.path.join(data, name + ".jsonl.gz"), "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for _, line in zip(range(count), f)]
    assert len(rows) == count, (name, len(rows))
    return ["\n".join([r["context"], r["question"], *r["choices"]]) for r in rows]


def ids_digest(lists):
    """Of the number of ids, then the ids, of each text: 32-bit little-endian."""
    h = hashlib.sha256()
    for ids in lists:
        for v in [len(ids), *ids]:
            h.update(v.to_bytes(4, "little"))
    return h.hexdigest()


def llama2(corpus):
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    # Words for training alone: Llama-2 itself merges over the whole text.
    t.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581+[^\u2581]*"), "isolated")
    # A small alphabet leaves letters to byte fallback; runs of spaces are in Llama-2's vocabulary.
    spaces = ["x" + " " * n + "y" for n in range(2, 20)] * 50
    t.train_from_iterator(corpus + spaces, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special + byte_tokens,
                                                               limit_alphabet=100, show_progress=False))
    t.pre_tokenizer = None
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    j = json.loads(t.to_str())
    j["added_tokens"] = [a for a in j["added_tokens"] if a["content"] in special]  # bytes are plain tokens
    return j


def llama3(corpus):
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=VOCAB, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"])
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])])
    j = json.loads(t.to_str())
    # Every 16th merge goes: its token is then reached by ignore_merges alone.
    j["model"]["merges"] = [m for i, m in enumerate(j["model"]["merges"]) if i % 16 != 15]
    return j


def variants(base):
    """JSON merge patches of llama2.json: what other Llama-family files have, and what makes unknown tokens."""
    plain = [dict(t, normalized=True) for t in base["added_tokens"]]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    template = base["post_processor"]
    eos = dict(template, single=template["single"] + [{"SpecialToken": {"id": "</s>", "type_id": 0}}],
               special_tokens={**template["special_tokens"], "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}})
    return {
        "metaspace first": {"normalizer": None, "pre_tokenizer": {**metaspace, "prepend_scheme": "first"}},
        "metaspace always": {"normalizer": None, "pre_tokenizer": {**metaspace, "prepend_scheme": "always"}},
        "metaspace never": {"normalizer": None, "pre_tokenizer": {**metaspace, "prepend_scheme": "never"}},
        "normalised special tokens": {"added_tokens": plain},
        "unknown, fused": {"model": {"byte_fallback": False}},
        "unknown, each": {"model": {"byte_fallback": False, "fuse_unk": False}},
        "some bytes missing": {"model": {"vocab": {"<0xE2>": None, "<0xF0>": None}}},
        "no unknown token": {"model": {"byte_fallback": False, "unk_token": None}},
        "end of text appended": {"post_processor": eos},
    }


def patched(value, patch):  # RFC 7396
    if not isinstance(patch, dict):
        return patch
    out = dict(value) if isinstance(value, dict) else {}
    for k, v in patch.items():
        if v is None and not (k in ("normalizer", "pre_tokenizer", "unk_token")):
            out.pop(k, None)
        else:
            out[k] = patched(out.get(k), v)
    return out


def strings():
    fixed = [
        "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\n \n", "  \n\n  x", "a", " a", "a ", "  a  ", "a\n", "\na",
        "a  b", "a   b", "a\tb", "a \tb", "a\n\n\nb", "a \n b", "a\r\nb\r\n", "x\u00a0y", "x\u2003y", "x\u3000y", "\u2028x\u2029",
        "x\u0085y", "\u200bx", "\ufeffx", "\u2581", "\u2581\u2581x", "a\u2581b", " \u2581 ", "\u2581a b", "1", "12", "123",
        "1234", "12345", "1234567890", " 1", "1 2 3", "3.14159", "1,000,000", "1e-5", "0x1F", "2024-01-02", "a1b2c3", "x86_64",
        "\u0661\u0662\u0663", "\u00b2\u00b3\u00bd", "\u2167", "\uff11\uff12", "\U0001d7d8\U0001d7d9", "it's", "IT'S", "don't",
        "we'll", "WE'LL", "they've", "I'm", "I'M", "he'd", "you're", "YOU'RE", "'s", "'S", "''s", "'sx", "x'sy", "'\u017f",
        "a'\u017fb", "'tis", "'ll", "'Ll", "'lL", "o'clock", "rock'n'roll", "\u2019s", "!", "!!", "!!!", " !", "?!", "a!b", "!a",
        "...", "\u2026", "--", "\u2014", "(a)", "[b]{c}<d>", "a/b\\c", "#!/bin/sh", "a@b.c", "$5.00", "100%", "\u20ac5", "!\n\n",
        "! \n", ".\n\na", "?\r\n", "foo(bar);\n\tbaz();\n", "    def f(x):\n        return x\n", "\x00", "a\x00b", "\x01\x02",
        "\x07\x08\x0b\x0c", "\x1b[31mred\x1b[0m", "\x7f", "\x80", "\x9f", "\u00ad", "\u0301", "e\u0301", "\u00e9", "caf\u00e9",
        "na\u00efve", "\u00dcber", "stra\u00dfe", "\u0130\u0131", "\ufb01", "\ufb06", "\u01c5", "\u1e9e", "\u03a3\u03c3\u03c2",
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "\u0645\u0631\u062d\u0628\u0627",
        "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "\u4f60\u597d\uff0c\u4e16\u754c", "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8", "\ud55c\uad6d\uc5b4",
        "\u1112\u1161\u11ab", "\U0001f600", "\U0001f600\U0001f601", " \U0001f600 ", "a\U0001f600b", "\U0001f44d\U0001f3fd",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U00020000\U0002a6df",
        "\U0010ffff", "\uffff", "\ue000", "\U000e0041", "\ufdd0", "\U0001f9ff\n\U0001f9ff", "\u202eabc\u202c", "z\u0335\u0321a",
        "<s>", "</s>", "<unk>", "<s>a", "a<s>", "a<s>b", " <s> ", "a <s> b", "<s></s>", "<s><s>", "<s", "s>", "<<s>>", "<S>",
        "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", "<|im_start",
        "<|begin_of_text|>a", "a<|eot_id|>", "<|eot_id|> a", "<reponame>", "<repo_name>x", "<filename><gh_stars>", "<0x41>",
        "<0xFF>", "<0xe2>", "\u0120the", "\u0120", "\u010a", "a\u0100b", "\u0143", "Question: What?\nA. x\nB. y\nAnswer:",
        "true", "false", " A", " B", "A", "Answer: A", "Zebra", "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaa",
        "abababababababab", "ThisIsCamelCase", "snake_case_name", "https://example.org/a?b=c&d=%20#e", "e=mc^2", "a+b=c", "<a b='c'>",
        "\"quoted\"", "\u201cquoted\u201d", "tab\tseparated\tvalues", "x" * 300, "ab" * 200, " " * 300, "\n" * 100, "1" * 200,
        "!" * 200, "\u00e9" * 100, "\U0001f600" * 60, "the " * 100, " the" * 100, "\u2581" * 50, "a\n" * 60, "'s" * 40,
        "a" * 1999 + "b", "Lorem ipsum dolor sit amet. " * 30,
    ]
    alphabet = ["a", "the", "Th", "ing", " ", "  ", "\n", "\r", "\t", "'", "s", "S", "'re", "'LL", "1", "22", "\u0663", ".", "!?",
                "-", "_", "<s>", "<|im_end|>", "<|eot_id|>", "\u2581", "\u00e9", "e\u0301", "\u4f60", "\U0001f600", "\u200d",
                "\u00a0", "\u3000", "\x00", "\x85", "\u017f", "\u0120", "<0x0A>", "\ufffd"]
    r = random.Random(20)
    return fixed + ["".join(r.choice(alphabet) for _ in range(r.randint(2, 24))) for _ in range(160)]


def split_digests(out):
    kinds = {
        "digits, gpt2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])}
    digit, pattern = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    blocks = [*range(0, 0x34000, 0x1000), 0xe0000, 0x10f000]
    newer = []  # the package's Digits knows a newer Unicode than its patterns: these few differ between the two
    lines = []
    for begin in blocks:
        h = {k: hashlib.sha256() for k in kinds}
        for c in range(begin, begin + 0x1000):
            if 0xd800 <= c < 0xe000:
                continue
            x = chr(c)
            if (len(digit.pre_tokenize_str("a" + x)) == 2) != (len(pattern.pre_tokenize_str("1" + x)) == 1):
                newer.append(c)
                continue
            text = f"a{x}1{x} {x}!{x}\n{x}'{x}s"
            for k, p in kinds.items():
                h[k].update(bytes(len(piece) for piece, _ in p.pre_tokenize_str(text)) + b"\0")
        lines.append([begin, *(h[k].hexdigest() for k in kinds)])
    write(os.path.join(out, "splits.json"), {"kinds": list(kinds), "skipped": newer, "blocks": lines}, indent=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data", default=os.environ.get("MIXLORA_DATA", "data"))
    parser.add_argument("--out", default="tests/golden/tokenizer")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    rows = [(name, texts(options.data, name, count)) for name, count in ROWS]
    corpus = [t for _, part in rows for t in part]
    made = {"llama2": llama2(corpus), "llama3": llama3(corpus)}
    for name, j in made.items():
        write(os.path.join(options.out, name + ".json"), j, separators=(",", ":"))
    tokenizers = {k: Tokenizer.from_str(json.dumps(j)) for k, j in made.items()}
    tokenizers["smollm2"] = Tokenizer.from_file(os.path.join(options.model, "tokenizer.json"))

    result = {"block": BLOCK, "files": [{"file": n, "rows": len(t), "text": hashlib.sha256("\0".join(t).encode()).hexdigest()}
                                        for n, t in rows]}
    for k in KINDS:
        ids = [e.ids for e in tokenizers[k].encode_batch(corpus, add_special_tokens=False)]
        result[k] = {"tokens": sum(map(len, ids)),
                     "digests": [ids_digest(ids[i:i + BLOCK]) for i in range(0, len(ids), BLOCK)]}
    write(os.path.join(options.out, "rows.json"), result, indent=0)

    hard = strings()
    table = {"strings": hard, "kinds": {}, "variants": []}
    for k in KINDS:
        t = tokenizers[k]
        plain = [t.encode(s, add_special_tokens=False).ids for s in hard]
        table["kinds"][k] = {"ids": plain, "with_special": t.encode("a b").ids,
                             "decoded": [t.decode(i, skip_special_tokens=False) for i in plain]}
    few = hard[::3]
    for name, patch in variants(made["llama2"]).items():
        t = Tokenizer.from_str(json.dumps(patched(made["llama2"], patch)))
        table["variants"].append({"name": name, "patch": patch, "ids": [t.encode(s).ids for s in few]})
    write(os.path.join(options.out, "strings.json"), table, separators=(",", ":"))
    split_digests(options.out)


if __name__ == "__main__":
    main()
