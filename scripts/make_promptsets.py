"""The prompt sets that `duoserve bench` runs, duoserve/promptsets, made again from what is committed and from one installed
manual.

On Debian 12, with the package apache2-doc, in a clone of this repository with its history:
    python scripts/make_promptsets.py

Knows where text under a free licence is and how long a prompt shall be; knows nothing of models. Short pieces are taken from
benchmarks/prompts, which the demo was not trained on; long prose is cut from the Apache manual, code from this project's
files as they were at one commit, so that the same bytes come out whatever the files are today.
"""

import argparse
import hashlib
import json
import random
import subprocess
from pathlib import Path

from demo_corpus import deduplicate, read_source
from make_prompts import APACHE, ROOT, cut, pieces, write
from tokenizers import Tokenizer

COMMIT = "af8bb65328"
EACH, LONG = 24, 6  # prompts of a set, and how many of them are long
SHORT_TOKENS, LONG_TOKENS = (40, 160), (520, 720)
MOST_BYTES = 70_000


def committed(name, domains=None):
    lines = (ROOT / "benchmarks" / "prompts" / f"{name}.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    return [p for p in prompts if domains is None or p["domain"] in domains]


def drawn(prompts, n, seed):
    """`n` of them, no two of one document where there are enough."""
    found, seen = [], set()
    for prompt in random.Random(seed).sample(prompts, len(prompts)):
        document = prompt["id"].partition("#")[0].partition("?")[0]
        if document not in seen and len(found) < n:
            seen.add(document)
            found.append(prompt)
    return found


def own_code(tokenizer, n, tokens, seed):
    """Pieces of this project's Python files at COMMIT, each from the beginning of a function or class."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", COMMIT], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = [p for p in listed if p.endswith(".py") and p.startswith("duoserve/")]
    rng = random.Random(seed)
    found = []
    for path in rng.sample(files, len(files)):
        text = subprocess.run(["git", "show", f"{COMMIT}:{path}"], cwd=ROOT, capture_output=True, text=True, check=True)
        lines = text.stdout.splitlines(keepends=True)
        begins = [i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "@"))]
        if not begins or len(found) == n:
            continue
        at = rng.choice(begins)
        piece = cut("".join(lines[at:]), rng.randint(*tokens), tokenizer)
        if len(tokenizer.encode(piece).ids) >= tokens[0]:
            found.append({"id": f"duoserve/{path}#{at + 1}", "domain": "code", "text": piece})
    return found


def long_prose(tokenizer, n, seed):
    documents = deduplicate(read_source(APACHE))
    random.Random(seed).shuffle(documents)
    found = []
    for document in documents:
        for at, text in pieces(document, 1, LONG_TOKENS, tokenizer):
            if len(found) < n:
                found.append({"id": f"{document.source}/{document.path}#{at}", "domain": "prose", "text": text})
    return found


def spread(short, long):
    """One long prompt after every few short ones, so that every phase meets both."""
    every = len(short) // len(long)
    return [p for i, one in enumerate(long) for p in (*short[i * every : (i + 1) * every], one)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "duoserve" / "promptsets")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(ROOT / "duoserve" / "demo" / "tokenizer.json"))
    documentation = committed("documentation", {"perl-doc", "postgresql-doc-15", "python3.11-doc"})
    library = committed("documentation", {"Python standard library"})
    questions = committed("questions")
    n = EACH - LONG
    short = [p for p in questions if sum(len(m["content"]) for m in p["messages"]) < 600]
    longest = sorted(questions, key=lambda p: -sum(len(m["content"]) for m in p["messages"]))[:LONG]
    sets = {
        "prose": spread(drawn([*documentation, *committed("apache")], n, "prose"), long_prose(tokenizer, LONG, "long")),
        "code": spread(
            [*drawn(library, n // 2, "library"), *own_code(tokenizer, n - n // 2, SHORT_TOKENS, "own")],
            own_code(tokenizer, LONG, LONG_TOKENS, "long"),
        ),
        "questions": spread(drawn(short, n, "questions"), longest),
    }
    for name, prompts in sets.items():
        if name == "code":
            random.Random("code").shuffle(prompts)
        prompts = [p | {"domain": name} for p in prompts]
        assert len(prompts) == EACH and len({p["id"] for p in prompts}) == EACH, (name, len(prompts))
        write(options.out / f"{name}.jsonl", prompts, MOST_BYTES)
    sums = {f"{name}.jsonl": _sha256(options.out / f"{name}.jsonl") for name in sets}
    (options.out / "manifest.json").write_text(json.dumps(sums, indent=1) + "\n")


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
