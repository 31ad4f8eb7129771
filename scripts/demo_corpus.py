"""The demo model's text: which installed files are read, deduplicated, split, and turned into tokens.

Knows where Debian packages put their documentation. Knows nothing of models; conversations are demo_chat's.
Writes into the work directory: train.txt, heldout.txt, corpus.json (figures), tokenizer.json, train.bin, chat.bin,
heldout.bin, heldout-chat.bin (uint16 token ids) and chat-starts.npy (where each conversation begins in chat.bin).
"""

import gzip
import hashlib
import json
import re
import sysconfig
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_chat import DocumentChats, conversations
from demo_text import Block, read_html, read_man, read_plain, read_pod, render
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, SYSTEM, USER, ASSISTANT = SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 4096
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELDOUT_SHARE = 0.04  # of documents
PARAGRAPH = 80  # characters; a longer block is kept only where it is first seen
COMMON = 40  # a shorter block in more documents than this is furniture (menus, footers, legends)
SMALLEST = 200  # characters; what is left of a shorter document is dropped


class Source(NamedTuple):
    """Files of one package. The glob is relative to the folder; `without` is a regular expression on the path."""

    name: str
    licence: str
    folder: str
    glob: str
    without: str = r"$^"


def sources():
    docs, stdlib = "/usr/share/doc/", sysconfig.get_path("stdlib")
    index = r"/(genindex|search|py-modindex|contents|bookindex|index-all)[^/]*$"
    return [
        Source("python3.11-doc", "PSF-2.0", docs + "python3.11/html", "**/*.html", index),
        Source("git-doc", "GPL-2.0", docs + "git-doc", "**/*.html", r"-\d+\.\d+\.html$"),
        Source("git-doc", "GPL-2.0", docs + "git-doc/RelNotes", "*.txt"),
        Source("perl-doc", "Artistic or GPL-1+", "/usr/share/perl", "*/pod/*.pod", r"perl(cn|jp|ko|tw|toc)\.pod$"),
        Source("perl-doc", "Artistic or GPL-1+", "/usr/share/man/man3", "*perl*.gz"),
        Source("debian-handbook", "CC-BY-SA-3.0 or GPL-2+", docs + "debian-handbook/html/en-US", "**/*.html", index),
        Source("debian-policy", "GPL-2+", docs + "debian-policy", "**/*.html", index + r"|/policy-1\.html|-1\.html$"),
        Source("debian-reference-en", "GPL-2+", "/usr/share/debian-reference", "*.en.html", index),
        Source("developers-reference", "GPL-2+", "/usr/share/developers-reference", "*.html", index),
        Source("linux-doc-6.1", "GPL-2.0", docs + "linux-doc-6.1/html", "**/*.html", index + "|/translations/"),
        Source("postgresql-doc-15", "PostgreSQL", docs + "postgresql-doc-15/html", "*.html", index),
        Source("Python standard library", "PSF-2.0", stdlib, "**/*.py",
               r"/(tests?|idle_test|site-packages|dist-packages|pydoc_data|encodings|__pycache__|_sysconfig[^/]*)(/|$)"),
    ]  # fmt: skip


class Document(NamedTuple):
    source: str
    path: str
    blocks: list[Block]

    @property
    def held_out(self):
        """By the path, so that the split is the same on every machine and does not change with the order."""
        digest = hashlib.sha256(f"{self.source}/{self.path}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def read(source, path):
    """One file as a Document; the path is kept relative to the source's folder."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", errors="ignore").replace("\r\n", "\n")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    reader = {".html": read_html, ".pod": read_pod, ".py": read_plain, ".txt": read_plain}.get(suffix, read_man)
    return Document(source.name, str(path.relative_to(source.folder)), reader(text))


def read_source(source):
    paths = sorted(p for p in Path(source.folder).glob(source.glob) if p.is_file())
    return [read(source, p) for p in paths if not re.search(source.without, str(p))]


def deduplicate(documents):
    """Drops blocks seen before, furniture, and documents of which little is left.

    A long block stays where it is first seen, so none is in both training and held-out text; a document that repeats
    another, whole or in part, loses what it repeats.
    """

    def normal(text):
        return hashlib.blake2b(re.sub(r"\W+", " ", text.lower()).encode(), digest_size=12).digest()

    seen_in = Counter()
    for document in documents:
        seen_in.update({normal(b.text) for b in document.blocks if len(b.text) < PARAGRAPH})
    seen, kept = set(), []
    for document in documents:
        blocks = []
        for block in document.blocks:
            key = normal(block.text)
            if len(block.text) < PARAGRAPH:
                if seen_in[key] <= COMMON or block.kind in ("raw", "dt") or block.kind[0] == "h":
                    blocks.append(block)
            elif key not in seen:
                seen.add(key)
                blocks.append(block)
        blocks = without_empty_sections(blocks)
        if sum(len(b.text) for b in blocks if b.kind[0] != "h") >= SMALLEST:
            kept.append(document._replace(blocks=blocks))
    return kept


def without_empty_sections(blocks):
    """A heading directly before one of its own level, or at the end, has lost its text."""
    kept = []
    for block in reversed(blocks):
        follower = kept[-1].kind if kept else "h0"
        if not (block.kind[0] == "h" and follower[0] == "h" and follower <= block.kind):
            kept.append(block)
    return kept[::-1]


def train_tokenizer(texts):
    """Byte-level BPE. Split much as GPT-4's: at most two digits, and a run of spaces (indentation) is one token."""
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY and tokenizer.token_to_id(END) == 0, "vocabulary"
    return tokenizer


def encode(tokenizer, texts, size=1000):
    """Token ids of each text, followed by the end token, as uint16 arrays."""
    for at in range(0, len(texts), size):
        for encoding in tokenizer.encode_batch(texts[at : at + size]):
            yield np.array([*encoding.ids, 0], dtype=np.uint16)


def write_tokens(work, name, pieces):
    pieces = list(pieces)
    tokens = np.concatenate(pieces)
    tokens.tofile(work / f"{name}.bin")
    print(f"{name}: {len(pieces):,} pieces, {len(tokens) / 1e6:.2f} M tokens", flush=True)
    return np.cumsum([0] + [len(p) for p in pieces[:-1]])


def figures(documents):
    """Documents and bytes by source, for the log and the model card."""
    rows = {}
    for document in documents:
        row = rows.setdefault(document.source, {"documents": 0, "bytes": 0, "heldout_documents": 0, "heldout_bytes": 0})
        part = "heldout_" if document.held_out else ""
        row[part + "documents"] += 1
        row[part + "bytes"] += len(render(document.blocks).encode())
    for source in sources():
        rows.get(source.name, {})["licence"] = source.licence
    return rows


def write_sample(documents, path, most=180_000):
    """Whole held-out documents under the PSF and PostgreSQL licences, alternating, up to `most` bytes: test data."""
    names = ("python3.11-doc", "postgresql-doc-15", "Python standard library")
    queues = [[d for d in documents if d.source == name and d.held_out] for name in names]
    chosen, size = [], 0
    while any(queues):
        for queue in filter(None, queues):
            text = render(queue.pop(0).blocks)
            if len(text) < 20_000 and size + len(text.encode()) < most:
                chosen.append(text)
                size += len(text.encode()) + 2
    path.write_text("\n\n".join(chosen) + "\n")


def build(work):
    """Reads, deduplicates, splits, and writes everything that training and evaluation read."""
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        documents = deduplicate([d for group in pool.map(read_source, sources()) for d in group])
    rows = figures(documents)
    for name, row in rows.items():
        sizes = f"{row['bytes'] / 1e6:.2f} MB, held out {row['heldout_bytes'] / 1e6:.2f} MB"
        print(f"{name}: {row['documents']} documents, {sizes}")
    train = [render(d.blocks) for d in documents if not d.held_out]
    heldout = [render(d.blocks) for d in documents if d.held_out]
    (work / "heldout.txt").write_text("\n\n".join(heldout) + "\n")
    (work / "train.txt").write_text("\n\n".join(train) + "\n")
    write_sample(documents, work / "sample.txt")
    (work / "corpus.json").write_text(json.dumps(rows, indent=1))
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(work / "tokenizer.json"))
    write_tokens(work, "train", encode(tokenizer, train))
    write_tokens(work, "heldout", encode(tokenizer, heldout))
    for name, part in (("chat", False), ("heldout-chat", True)):
        chats = conversations([DocumentChats(d.path, d.blocks) for d in documents if d.held_out == part])
        starts = write_tokens(work, name, encode(tokenizer, chats))
        np.save(work / f"{name}-starts.npy", starts)
        (work / f"{name}.txt").write_text(("\n" + "=" * 40 + "\n").join(chats))
