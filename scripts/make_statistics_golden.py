#!/usr/bin/env python3
"""Writes tests/golden/statistics.json: cases for reports/statistics.h with scipy's and statsmodels' answers.

usage: python3 scripts/make_statistics_golden.py        (numpy, scipy, statsmodels)
The two-level numbers come from a two-way analysis of variance (statsmodels' anova_lm); the bootstrap's indices from an own
Philox 4x32-10, since its interval depends on every draw.
"""
import json
import math
import pathlib

import numpy as np
import pandas
import scipy.stats as st
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

rng = np.random.default_rng(20)
M32 = 0xFFFFFFFF


def philox(c, k):
    c, k = list(c), list(k)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & M32, (p0 >> 32) ^ c[3] ^ k[1], p0 & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


def random_key(seed, purpose):
    m = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15 * (1 + purpose)) & m
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
    z ^= z >> 31
    return z & M32, z >> 32


def draws(key, resample, stratum, n):
    out = []
    for block in range((n + 3) // 4):
        out += [(v * n) >> 32 for v in philox((block, resample, stratum, 0), key)]
    return np.array(out[:n])


def distributions():
    return {
        "normal_quantile": [[p, st.norm.ppf(p)] for p in (1e-12, 1e-5, 0.01, 0.2, 0.5, 0.7, 0.975, 0.9999)],
        "normal_cdf": [[x, st.norm.cdf(x)] for x in (-8.0, -3.0, -0.5, 0.0, 1.0, 2.5)],
        "student_quantile": [[p, d, st.t.ppf(p, d)] for p in (0.025, 0.4, 0.6, 0.95, 0.975, 0.9995) for d in (1, 2, 3.7, 9, 150.5)],
        "student_cdf": [[t, d, st.t.cdf(t, d)] for t in (-4.0, -1.0, 0.0, 0.3, 2.0) for d in (1, 2.5, 30)],
        "binomial_cdf": [[k, n, p, st.binom.cdf(k, n, p)] for k, n, p in ((0, 5, 0.5), (3, 9, 0.5), (40, 100, 0.5), (7, 1000, 0.01), (990, 2000, 0.5))],
        "binomial_quantile": [[q, n, p, int(st.binom.ppf(q, n, p))] for q, n, p in ((0.025, 6, 0.5), (0.025, 5, 0.5), (0.5, 11, 0.3), (0.975, 400, 0.5))],
    }


def shares():
    out = []
    for right, n in ((0, 10), (3, 10), (10, 10), (41, 64), (1782, 2376), (1, 1000)):
        x = np.array([1.0] * right + [0.0] * (n - right))
        row = {"right": right, "n": n, "se": float(st.sem(x)), "wilson": proportion_confint(right, n, 0.05, method="wilson"),
               "wilson99": proportion_confint(right, n, 0.01, method="wilson")}
        low, high = DescrStatsW(x).zconfint_mean(0.05) if 0 < right < n else (right / n, right / n)
        row["normal"] = [max(0.0, low), min(1.0, high)]
        out.append(row)
    return out


def seeds():
    out = []
    for k in (2, 3, 5, 10):
        x = rng.normal(0.7, 0.02, k)
        low, high = st.t.interval(0.95, k - 1, x.mean(), st.sem(x))
        out.append({"scores": x.tolist(), "mean": x.mean(), "sd": x.std(ddof=1), "interval": [low, high]})
    return out


def mean_squares(grid):
    k, n = grid.shape
    frame = pandas.DataFrame({"y": grid.ravel(), "seed": np.repeat(np.arange(k), n), "question": np.tile(np.arange(n), k)})
    table = anova_lm(ols("y ~ C(seed) + C(question)", frame).fit(), typ=1)
    ms = table["mean_sq"]
    return ms["C(question)"], ms["C(seed)"], ms["Residual"]


def two_level():
    out = []
    for k, n, spread in ((3, 40, 0.15), (2, 25, 0.3), (5, 30, 0.0)):
        easy = rng.normal(0.3, 0.8, n)
        grid = ((easy + rng.normal(0, spread, k)[:, None] + rng.normal(0, 0.7, (k, n))) > 0).astype(float)
        q, s, e = mean_squares(grid)
        parts = [(q / (n * k), n - 1)]
        if s / (n * k) > e / (n * k):
            parts += [(s / (n * k), k - 1), (-e / (n * k), (n - 1) * (k - 1))]
        variance = sum(v for v, _ in parts)
        df = variance**2 / sum(v * v / d for v, d in parts)
        low, high = st.t.interval(0.95, df, grid.mean(), math.sqrt(variance))
        out.append({"grid": grid.astype(int).tolist(), "mean": grid.mean(), "se": math.sqrt(variance), "df": df, "interval": [low, high],
                    "p": 2 * st.t.sf(abs(grid.mean()) / math.sqrt(variance), df)})
    return out


def pairs():
    out = []
    for a, b, c, d in ((30, 5, 1, 14), (10, 0, 0, 5), (100, 12, 30, 58), (5, 1, 0, 2), (1200, 140, 95, 941)):
        p = mcnemar([[a, b], [c, d]], exact=True).pvalue if b + c else 1.0
        n = a + b + c + d + 2
        x, y = (b + 1) / n, (c + 1) / n
        half = st.norm.ppf(0.975) * math.sqrt((x + y - (x - y) ** 2) / n)
        out.append({"pairs": [a, b, c, d], "p": float(p), "interval": [x - y - half, x - y + half]})
    return out


def bootstrap():
    key = random_key(42, 6)
    suites = [rng.choice([-1.0, 0.0, 1.0], n, p=[0.1, 0.7, 0.2]) for n in (50, 33)]
    means = [np.mean([d[draws(key, r, s, len(d))].mean() for s, d in enumerate(suites)]) for r in range(400)]
    ours = np.quantile(means, [0.025, 0.975])
    one = suites[0]
    theirs = st.bootstrap((one,), np.mean, method="percentile", n_resamples=20000, random_state=1).confidence_interval
    a, b = rng.lognormal(0, 0.1, 21), rng.lognormal(0.1, 0.1, 18)
    ratios = [np.median(b[draws(key, r, 1, len(b))]) / np.median(a[draws(key, r, 0, len(a))]) for r in range(300)]
    return {"suites": [d.tolist() for d in suites], "resamples": 400, "interval": ours.tolist(), "scipy": list(theirs),
            "a": a.tolist(), "b": b.tolist(), "ratio_resamples": 300, "ratio": np.quantile(ratios, [0.025, 0.975]).tolist()}


def corrections():
    out = []
    for n in (1, 3, 8):
        p = np.round(rng.uniform(0, 0.2, n) ** 1.5, 6)
        out.append({"p": p.tolist(), "holm": multipletests(p, method="holm")[1].tolist()})
    out.append({"p": [0.04, 0.01, 0.01, 1.0], "holm": multipletests([0.04, 0.01, 0.01, 1.0], method="holm")[1].tolist()})
    return out


def latencies():
    out = {"mann_whitney": [], "median": []}
    for n1, n2, ties in ((3, 4, False), (8, 40, False), (9, 9, False), (6, 7, True), (50, 60, True), (30, 30, False), (2, 2, False)):
        x, y = rng.normal(1, 0.1, n1), rng.normal(1.06, 0.1, n2)
        if ties:
            x, y = np.round(x, 1), np.round(y, 1)
        exact = not ties and min(n1, n2) <= 8
        r = st.mannwhitneyu(x, y, alternative="two-sided", method="exact" if exact else "asymptotic")
        out["mann_whitney"].append({"x": x.tolist(), "y": y.tolist(), "u": r.statistic, "p": r.pvalue, "exact": exact})
    for n in (6, 9, 20, 101):
        x = rng.lognormal(0, 0.3, n)
        i = st.quantile_test(x, q=np.median(x), p=0.5).confidence_interval(0.95)
        out["median"].append({"x": x.tolist(), "median": float(np.median(x)), "interval": [i.low, i.high]})
    return out


golden = {"distributions": distributions(), "shares": shares(), "seeds": seeds(), "two_level": two_level(), "pairs": pairs(),
          "bootstrap": bootstrap(), "holm": corrections(), "latencies": latencies()}
target = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/statistics.json"
target.write_text(json.dumps(golden, default=float, indent=0) + "\n")
print(f"{target}: {target.stat().st_size} bytes")
