"""Recipes that somebody could write by mistake, or to do harm: seeded, each with the overrides it comes with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import yaml

VALUES: list[Any] = [
    *(None, -1, 0, 1.5, 10**30, -(10**30), 2**63, 2**62, 1e308, float("nan"), float("inf"), True, 10**19 + 1),
    *(
        "",
        "x" * 300,
        "x" * 5000,
        "\0",
        "../..",
        "/dev/null",
        "/dev/zero",
        "1e-5 ",
        "ünï\u2028",
        "${NOT_SET}",
        "~nobody",
    ),
    *([], [[]], {}, {"a": {}}, [None] * 3, ["x"] * 500, "nan", "\U0001f680" * 40),
]


def _bomb(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, depth):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines) + "\n"


def texts(good: str, *, many: int) -> dict[str, bytes]:
    """Whole files, by what is wrong with each; `many` lines or levels where there are too many."""
    found = {
        "bomb 5": _bomb(5),
        "bomb 9": _bomb(9),
        "bomb of mappings": "a: &a {x: 1}\nb: &b {p: *a, q: *a}\n"
        + "".join(
            f"k{i}: &k{i} {{p: *{'k' + str(i - 1) if i else 'b'}, q: *{'k' + str(i - 1) if i else 'b'}}}\n"
            for i in range(40)
        ),
        "an alias in its own anchor": good.replace("objective: sft", "objective: &x [*x]"),
        "a mapping in itself": "a: &a {b: *a}\n",
        "merge key": good + "x: &x {seed: 1}\ntrain2:\n  <<: *x\n",
        "deep list": "[" * many,
        "deep list, closed": "a: " + "[" * many + "]" * many,
        "deep mapping": "{a: " * many,
        "deep block": "".join(f"{' ' * i}a:\n" for i in range(600)),
        "deep by far": "[" * 60 * many,
        "flow keys": "{" + "? " * 20_000,
        "many anchors": "\n".join(f"k{i}: &a{i} 1" for i in range(many)),
        "many keys": "\n".join(f"k{i}: 1" for i in range(many)),
        "long": "a: " + "x" * 2**18,
        "long comment": "# " + "x" * 2**19 + "\n" + good,
        "one long key": "k" * 100_000 + ": 1\n" + good,
        "one key of two lines": '"a\n\n b": 1\n',
        "tab": "\tx: 1",
        "NUL": "a: \0",
        "a tag that runs code": 'a: !!python/object/apply:os.system ["id"]\n',
        "unknown tag": "a: !foo {b: 1}\n",
        "int that is none": good.replace("seed: 1", "seed: !!int x"),
        "int that is empty": good.replace("seed: 1", "seed: !!int ''"),
        "int of base 60": good.replace("seed: 1", "seed: !!int 1:x"),
        "float that is none": good.replace("lr: 1e-3", "lr: !!float x"),
        "bool that is none": good.replace("seed: 1", "seed: !!bool maybe"),
        "binary": "a: !!binary '=='\n",
        "set": "a: !!set {x}\n",
        "two documents": "a: 1\n---\nb: 2\n",
        "number as key": "1: 2\n",
        "list as key": "? [a, b]\n: 1\n",
        "mapping as key": "? {a: b}\n: 1\n",
        "null as key": "~: 1\n",
        "twice": good + "objective: sft\n",
        "twice below": good.replace("  seed: 1", "  seed: 1\n  seed: 2"),
        "list": "[1]",
        "text": "hello",
        "empty": "",
        "only a comment": "# x\n",
        "number": "1e400",
        "an integer of 6000 digits": good.replace("seed: 1", "seed: " + "9" * 6000),
        "a negative of 4200 digits": good.replace("seed: 1", "seed: -" + "9" * 4200),
        "an integer of 3000 digits": good.replace("seed: 1", "seed: " + "9" * 3000),
        "an integer with underscores": good.replace("seed: 1", "seed: 1" + "_" * 9000 + "1"),
        "a float beyond": good.replace("lr: 1e-3", "lr: 1e999999999"),
        "half a character": good.replace("objective: sft", 'objective: "\\ud800"'),
        "half a character as path": good.replace("hf: model", 'hf: "\\ud800"'),
        "half a character as key": good + '"\\udfff": 1\n',
        "half a character in a set's name": good.replace("{chat: chat.jsonl}", '{"\\ud800": chat.jsonl}'),
        "NUL as path": good.replace("hf: model", 'hf: "mo\\0del"'),
        "escape without end": 'a: "\\x',
        "a directive": "%YAML 9.9\n---\na: 1\n",
        "a directive twice": "%YAML 1.1\n%YAML 1.1\n---\na: 1\n",
        "not closed": good + "x: {a: [1\n",
        "percent": "%",
        "at": "@",
        "backtick": "`",
        "carriage returns": good.replace("\n", "\r"),
        "everything indented": "".join(f"  {line}\n" for line in good.splitlines()) + "x: 1\n",
    }
    raw = {name: text.encode("utf-8", "surrogatepass") for name, text in found.items()}
    return raw | {
        "UTF-16": good.encode("utf-16"),
        "Latin-1": good.replace("model", "mödel").encode("latin-1"),
        "surrogate bytes": b"a: \xed\xa0\x80\n",
        "zip": b"PK\x03\x04" + bytes(range(256)) * 20,
        "NULs": b"\0" * 5000,
    }


OVERRIDES = [
    *("", "=", "=1", "a", "a=", "train", "train=", "train=1", "train.seed", "train.seed=", "train..seed=1"),
    *(
        ".train=1",
        "train.=1",
        "train.seed.x=1",
        "__class__.x=1",
        "train.seed=[1",
        "train.seed={",
        "train.seed=*x",
    ),
    *("train.seed=&x [*x]", "train.seed=!!python/name:os.system", "train.seed=!!int x", "train.seed=\udcff"),
    *(
        "\udcff=1",
        "train.seed=" + "9" * 6000,
        "train.seed=" + "[" * 5000,
        "x" * 5000 + "=1",
        ".".join("a" * 500) + "=1",
    ),
    *(
        "data.train=/dev/zero",
        "run_dir=/dev/null",
        "run_dir=/dev/null/x",
        "run_dir=" + "n" * 256,
        "model.hf=recipe.yaml",
    ),
    *(
        "data.train=[" + "x," * 5000 + "]",
        "train.seed=1: 2: 3",
        "train.seed=\t",
        "train.seed=\x07",
        "data={}",
        "model=null",
    ),
    *(
        "layout=[1]",
        "objective={name: sft, x: 1}",
        "objective={}",
        "objective=[]",
        "objective=null",
        "data.validation.x=1",
    ),
    *(
        "data.chat_template=/dev/zero",
        "data.chat_template=.",
        "data.chat_template=recipe.yaml",
        "tokenizer=nowhere",
    ),
    "data.train={path: train.jsonl, weight: .inf}",
    "data.train={path: train.jsonl, name: 'a/b'}",
    "data.train={path: train.jsonl, columns: {messages: 5}}",
    "model.hf=${NOT_SET}",
]


def leaves(tree: dict[str, Any], key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*key, name)
        if isinstance(value, dict):
            yield from leaves(value, (*key, name))


def with_values(good: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """The good recipe with a bad value in one place, over every place and value, in a random order."""
    tree = yaml.safe_load(good.replace("1e-3", "0.001"))
    cases = [(key, i) for key in leaves(tree) for i in range(len(VALUES))]
    random.Random(seed).shuffle(cases)
    for key, i in cases:
        changed = deepcopy(tree)
        section = changed
        for name in key[:-1]:
            section = section[name]
        section[key[-1]] = VALUES[i]
        yield f"{'.'.join(key)} = {VALUES[i]!r:.40}", yaml.safe_dump(changed, allow_unicode=True).encode()


def mutated(good: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """The good recipe with bytes changed, cut, put in or repeated, without end."""
    draw = random.Random(seed)
    while True:
        text = bytearray(good.encode())
        for _ in range(draw.randint(1, 6)):
            at, kind = draw.randrange(len(text)), draw.random()
            if kind < 0.4:
                text[at] = draw.randrange(256)
            elif kind < 0.6:
                del text[at : at + draw.randint(1, 20)]
            elif kind < 0.8:
                text[at:at] = bytes(
                    draw.choice(b'{}[]&*!|>%@":\\\0\n\xff\t- ') for _ in range(draw.randint(1, 8))
                )
            else:
                text[at:at] = text[max(0, at - 30) : at]
        yield f"mutation {bytes(text)!r}", bytes(text)
