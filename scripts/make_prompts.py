"""The prompt sets under benchmarks/prompts, and prompts to train predictors with, made again from installed documentation.

On Debian 12, with the packages of demo_corpus and apache2-doc:
    python scripts/make_prompts.py --out benchmarks/prompts --train build/demo/train-prompts.jsonl

Knows which documents the demo model was not trained on (demo_corpus decides that by their paths) and how long a prompt
shall be; knows nothing of models. Everything is drawn from generators seeded by names: the same documents give the same
prompts. Committed are pieces under the PSF, PostgreSQL, Artistic and Apache licences only; prompts for training stay where
they are made.
"""

import argparse
import hashlib
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from demo_chat import DocumentChats, conversations
from demo_corpus import Source, deduplicate, read_source, sources
from demo_text import render
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
FREE = ("PSF-2.0", "PostgreSQL", "Artistic or GPL-1+")
APACHE = Source(
    "apache2-doc", "Apache-2.0", "/usr/share/doc/apache2-doc/manual/en", "**/*.html", r"/(sitemap|convenience)"
)
SHORT, LONG = (40, 160), (120, 480)  # tokens
MOST_BYTES = 300_000  # of a committed file
TURN = re.compile(r"<\|(system|user|assistant)\|>\n")


def pieces(document, many, tokens, tokenizer):
    """Up to `many` stretches of a document's text that begin with prose, each with the number of its first block."""
    rng = random.Random(f"{document.source}/{document.path}")
    begins = [
        at for at, block in enumerate(document.blocks) if len(block.text) > 60 and block.kind not in ("pre", "dt")
    ]
    begins = sorted(rng.sample(begins, min(many, len(begins))))
    for at, following in zip(begins, [*begins[1:], None], strict=False):
        text = cut(render(document.blocks[at:following]), rng.randint(*tokens), tokenizer)
        if len(tokenizer.encode(text).ids) >= tokens[0]:
            yield at, text


def cut(text, tokens, tokenizer):
    """At most so many tokens of a text, ending with a whole one."""
    offsets = tokenizer.encode(text[: tokens * 12]).offsets
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def texts(documents, n, each, tokens, tokenizer):
    """`n` prompts from as many documents as there are, `each` from one at most."""
    documents = sorted(documents, key=lambda d: hashlib.sha256(f"{d.source}/{d.path}".encode()).digest())
    by_document = [list(pieces(d, each, tokens, tokenizer)) for d in documents]
    found = []
    for turn in range(each):
        for document, some in zip(documents, by_document, strict=True):
            if turn < len(some) and len(found) < n:
                at, text = some[turn]
                name = f"{document.source}/{document.path}#{at}".replace(" ", "-")
                found.append({"id": name, "domain": document.source, "text": text})
    return sorted(found, key=lambda prompt: prompt["id"])


def messages(chat):
    """A conversation in the template's text as messages, up to its last question."""
    parts = TURN.split(chat.replace("<|endoftext|>", ""))[1:]
    said = [{"role": r, "content": c.removesuffix("\n")} for r, c in zip(parts[::2], parts[1::2], strict=True)]
    return said[:-1] if said[-1]["role"] == "assistant" else said


def chats(documents, n, each, domain):
    """`n` conversations that end with a question, `each` from one document at most."""
    found, seen = [], set()
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        made = [messages(c) for c in conversations([DocumentChats(document.path, document.blocks)])]
        random.Random(document.path).shuffle(made)
        for number, said in enumerate(made[:each]):
            question = said[-1]["content"]
            if question not in seen and len(found) < n:
                seen.add(question)
                name = f"{document.source}/{document.path}?{number}".replace(" ", "-")
                found.append({"id": name, "domain": domain, "messages": said})
    return sorted(found, key=lambda prompt: prompt["id"])


def write(path, prompts, most=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
    assert most is None or len(text.encode()) <= most, (path, len(text.encode()))
    path.write_text(text)
    print(f"{hashlib.sha256(text.encode()).hexdigest()}  {path}: {len(prompts)} prompts, {len(text.encode()):,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "prompts")
    parser.add_argument("--train", type=Path, default=Path("build/demo/train-prompts.jsonl"))
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(ROOT / "duoserve" / "demo" / "tokenizer.json"))
    with ProcessPoolExecutor() as pool:
        documents = deduplicate([d for group in pool.map(read_source, sources()) for d in group])
    training = [d for d in documents if not d.held_out]
    free = {source.name for source in sources() if source.licence in FREE}
    held_out = [d for d in documents if d.held_out and d.source in free]
    apache = deduplicate(read_source(APACHE))
    write(options.train, [
        *texts(training, 1500, 1, LONG, tokenizer),
        *chats(training, 400, 1, "questions"),
    ])  # fmt: skip
    write(options.out / "documentation.jsonl", texts(held_out, 240, 4, SHORT, tokenizer), MOST_BYTES)
    write(options.out / "apache.jsonl", texts(apache, 140, 2, SHORT, tokenizer), MOST_BYTES)
    write(options.out / "questions.jsonl", chats(held_out, 100, 2, "questions"), MOST_BYTES)


if __name__ == "__main__":
    main()
