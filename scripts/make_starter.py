#!/usr/bin/env python3
"""Writes the starter suites (suites/starter/*/{train,test}.jsonl): four small suites made from lists of plain facts.

Each fact goes to the train split or to the test split, never to both, so that the test asks for more than memory. They show
that the machinery works; they are no published benchmark. CC0-1.0, see suites/starter/LICENSE.
"""
import json
import os
import random

KINDS = {
    "fruit": "apple pear banana cherry grape mango peach plum lemon orange strawberry pineapple",
    "animal": "horse rabbit tiger elephant sheep wolf monkey donkey squirrel camel goat kangaroo",
    "color": "red blue green yellow purple brown pink white black gray violet turquoise",
    "tool": "hammer saw drill screwdriver wrench shovel axe rake pliers chisel crowbar ladder",
    "vehicle": "car bus train bicycle truck boat airplane motorcycle tram ship helicopter van",
    "body part": "hand knee elbow nose ear shoulder finger toe ankle chin wrist neck",
    "metal": "iron copper silver gold tin lead zinc aluminum nickel titanium mercury platinum",
    "musical instrument": "piano violin guitar flute trumpet drum cello harp clarinet saxophone banjo trombone",
}
USES = [("cut paper", "scissors"), ("dig a hole", "shovel"), ("drive a nail", "hammer"), ("sweep the floor", "broom"), ("boil water", "kettle"),
        ("tell the time", "clock"), ("open a lock", "key"), ("write a letter", "pen"), ("wash your hands", "soap"), ("dry your hair", "towel"),
        ("see in the dark", "flashlight"), ("eat soup", "spoon"), ("slice bread", "knife"), ("paint a wall", "brush"), ("catch a fish", "net"),
        ("measure a table", "ruler"), ("climb onto the roof", "ladder"), ("keep food cold", "refrigerator"), ("stay dry in the rain", "umbrella"),
        ("take a photograph", "camera"), ("sew a button", "needle"), ("brush your teeth", "toothbrush"), ("mow the lawn", "mower"),
        ("iron a shirt", "iron"), ("bake a cake", "oven"), ("call a friend", "telephone"), ("weigh flour", "scale"), ("light a candle", "match"),
        ("erase a pencil line", "eraser"), ("comb your hair", "comb"), ("fasten papers together", "stapler"), ("look at the stars", "telescope"),
        ("water the plants", "hose"), ("drink tea", "cup"), ("carry books to school", "backpack"), ("sleep outdoors", "tent")]
SIZES = ("ant bee mouse frog pigeon cat fox dog goat wolf pig lion cow horse rhinoceros elephant whale").split()
WEIGHTS = ("feather leaf coin pencil spoon apple book brick bucket chair suitcase table sofa piano car truck ship").split()


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def row(i, name, split, question, choices, answer, labels="ABCDE"):
    labels = list(labels[: len(choices)]) if isinstance(labels, str) else labels
    return {"id": f"{name}-{split}-{i}", "context": "", "question": question, "choices": choices, "labels": labels, "answer": answer}


def words(split):
    """Two words of three train, the third tests."""
    return {k: [w for i, w in enumerate(v.split()) if (i % 3 == 2) == (split == "test")] for k, v in KINDS.items()}


def questions(rng, split, n):
    table, kinds = words(split), list(KINDS)
    for i in range(n):
        kind = kinds[i % len(kinds)]
        right = rng.choice(table[kind])
        choices = [right] + [rng.choice(table[k]) for k in rng.sample([k for k in kinds if k != kind], 3)]
        rng.shuffle(choices)
        yield row(i, "question", split, f"Which of these is {article(kind)}?", choices, choices.index(right))


def truths(rng, split, n):
    table, kinds = words(split), list(KINDS)
    for i in range(n):
        kind, true = kinds[i % len(kinds)], rng.random() < 0.5
        word = rng.choice(table[kind if true else rng.choice([k for k in kinds if k != kind])])
        yield row(i, "truth", split, f"is {word} {article(kind)}", ["no", "yes"], int(true), ["false", "true"])


def solutions(rng, split, n):
    facts = [f for i, f in enumerate(USES) if (i % 3 == 2) == (split == "test")]
    for i in range(n):
        goal, tool = facts[i % len(facts)]
        other = rng.choice([t for g, t in facts if t != tool])
        choices = [f"Use {article(tool)}.", f"Use {article(other)}."]
        flip = rng.random() < 0.5
        yield row(i, "solution", split, f"How do you {goal}?", choices[::-1] if flip else choices, int(flip))


def blanks(rng, split, n):
    pairs = []
    for scale, text in ((SIZES, "The {a} is hidden behind the {b}, because the _ is much bigger."),
                        (WEIGHTS, "The {a} was easier to lift than the {b}, because the _ was too heavy.")):
        pairs += [(a, b, text) for x, a in enumerate(scale) for y, b in enumerate(scale) if y >= x + 3 and ((x + y) % 3 == 2) == (split == "test")]
    rng.shuffle(pairs)
    for i, (small, large, text) in enumerate(pairs[:n]):
        flip = rng.random() < 0.5
        yield row(i, "blank", split, text.format(a=small, b=large), [large, small][:: -1 if flip else 1], int(flip))


def main():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "suites", "starter")
    for name, make in (("question", questions), ("truth", truths), ("solution", solutions), ("blank", blanks)):
        for split, n in (("train", 96), ("test", 64)):
            folder = os.path.join(here, f"starter-{name}")
            os.makedirs(folder, exist_ok=True)
            rng = random.Random(f"{name} {split}")
            with open(os.path.join(folder, f"{split}.jsonl"), "w", encoding="utf-8") as f:
                for r in make(rng, split, n):
                    f.write(json.dumps(r, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
