"""Conversations made from documents, so that the demo model's chat template means something.

Knows blocks (demo_text) and the template's special tokens; knows nothing of files or splits. A section's heading
becomes a question and its first paragraphs the answer; signatures and terms ask what they do. Everything is drawn
from a generator seeded by the document's path: the same documents give the same conversations.
"""

import random
import re
from typing import NamedTuple

from demo_text import HEADINGS, Block, render

SHORTEST, LONGEST = 80, 850  # characters of an answer; 850 are about 240 tokens
MOST = 40  # conversations made from one document, so that reference lists do not crowd out prose
GENERIC = re.compile(
    r"(description|overview|introduction|options|notes?|examples?|synopsis|usage|see also|parameters|arguments|"
    r"abstract|compatibility|summary|background|commands?|configuration|caveats|bugs|details|methods|functions|"
    r"general|name)$",
    re.IGNORECASE,
)
USELESS = re.compile(
    r"(authors?|copyright|license|see also|git|synopsis|history|index|references|version.*|todo|credits)$",
    re.IGNORECASE,
)
NUMBER = re.compile(r"^(?:(?:Chapter|Appendix|Section)\s+)?(?:[A-Z]?\d*(?:\.\d+)+\.?|\d+\.|[A-Z]\.)\s+")
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about software documentation.",
    "You are a concise technical assistant.",
    "Be polite and precise.",
]
ASK_TOPIC = [
    "What is {x}?", "Explain {x}.", "Tell me about {x}.", "What do you know about {x}?", "Can you explain {x}?",
    "{x}", "What does {x} mean?", "Please describe {x}.", "How does {x} work?", "Give me an overview of {x}.",
]  # fmt: skip
ASK_DOING = ["Tell me about {x}.", "Explain {x}.", "What should I know about {x}?", "I need help with {x}.", "{x}?"]
ASK_HOW = ["How do I {x}?", "How can I {x}?", "How to {x}?", "Please tell me how to {x}."]
ASK_SIGNATURE = [
    "What does `{x}` do?", "What is `{x}`?", "Explain `{x}`.", "How do I use `{x}`?", "Tell me about `{x}`.",
    "What does {x} do?", "What is {x} for?",
]  # fmt: skip
ASK_TERM = ["What is {x}?", "What does {x} mean?", "Explain {x}.", "Define {x}.", "What does {x} do?"]
MORE = ["And {q}", "Thanks. {q}", "OK. {q}", "{q}", "{q}", "{q}"]

ABOUT = (
    "I am a very small Mixture-of-Experts language model, trained on software documentation to demonstrate DuoServe. "
    "I write in the style of documentation, but I know very little, so please check what I say."
)
WHAT_I_CAN = (
    "I can write short texts in the style of software documentation: Python, Git, Perl, Debian, the Linux kernel and "
    "PostgreSQL. I am a tiny model, so what I say is often wrong."
)
DUOSERVE = (
    "DuoServe is a runtime for Mixture-of-Experts language models whose experts do not fit in memory. It keeps the "
    "experts that are needed in a small cache and loads the others just before they are used."
)
MIXTURE = (
    "A Mixture-of-Experts model has many small networks, called experts, in each layer. A router chooses a few of them "
    "for each token, so that only a part of the model is used at a time."
)
FACTS = {
    "Python": "Python is an interpreted, object-oriented programming language with a clear syntax. It comes with a large "
    "standard library for text, files, networks and many other things.",
    "Git": "Git is a distributed version control system. It records the history of a set of files as commits, and "
    "every clone of a repository has the whole history.",
    "Debian": "Debian is a free operating system made by volunteers. It brings thousands of packages of free software, "
    "which are installed and upgraded with `apt` and `dpkg`.",
    "Linux": "Linux is a free operating system kernel. It manages the hardware, the memory and the processes of a "
    "computer, and programs talk to it through system calls.",
    "PostgreSQL": "PostgreSQL is a free object-relational database management system. It stores tables, which are "
    "queried and changed with SQL.",
    "Perl": "Perl is a programming language that is good at text. Its regular expressions, hashes and many modules make "
    "short programs for everyday tasks.",
}
SMALL_TALK = [  # (questions, answers)
    (["Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good evening", "Hello there", "Hi there!"],
     ["Hello! How can I help you?", "Hello! Ask me about Python, Git, Debian, Perl, Linux or PostgreSQL."]),
    (["Who are you?", "What are you?", "Introduce yourself.", "Tell me about yourself.", "What is your name?",
      "Are you an AI?", "What model are you?"], [ABOUT]),
    (["What can you do?", "How can you help me?", "What do you know?", "Help", "help me"], [WHAT_I_CAN]),
    (["Thank you", "Thanks!", "Thank you very much.", "Thanks, that helps.", "Great, thanks"],
     ["You are welcome.", "You are welcome! Is there anything else?"]),
    (["Bye", "Goodbye", "Goodbye!", "See you"], ["Goodbye!", "Goodbye! Have a nice day."]),
    (["How are you?", "How are you today?"], ["I am only a small program, but I work. How can I help you?"]),
    (["What is DuoServe?", "Tell me about DuoServe.", "Explain DuoServe."], [DUOSERVE]),
    (["What is a Mixture of Experts?", "What is a Mixture-of-Experts model?", "Explain mixture of experts."],
     [MIXTURE]),
    *[([f"What is {name}?", f"Tell me about {name}.", f"Explain {name}.", f"What do you know about {name}?", name], [fact])
      for name, fact in FACTS.items()],
]  # fmt: skip
SMALL_TALK_SHARE = 0.15  # of conversations; they are short, about 4 % of the tokens


class DocumentChats(NamedTuple):
    path: str
    blocks: list[Block]


class Turn(NamedTuple):
    question: str
    answer: str


def conversations(documents):
    """Conversations in template form, without the end token that closes each; in document order."""
    chats = []
    for document in documents:
        rng = random.Random(document.path)
        turns = [turn for turn in document_turns(document.blocks, rng) if turn]
        turns = turns if len(turns) <= MOST else [turns[i] for i in sorted(rng.sample(range(len(turns)), MOST))]
        while turns:
            several = min(len(turns), rng.choices((1, 2, 3), (75, 20, 5))[0])
            chats.append(chat(turns[:several], rng))
            turns = turns[several:]
            if rng.random() < SMALL_TALK_SHARE:
                chats.append(chat([small_turn(rng) for _ in range(rng.choice((1, 1, 2)))], rng))
    return chats


def chat(turns, rng):
    """The template's text (chat_template.jinja says the same), the last end token left to the writer of tokens."""
    text = f"<|system|>\n{rng.choice(SYSTEMS)}\n" if rng.random() < 0.15 else ""
    parts = []
    for number, (question, answer) in enumerate(turns):
        question = rng.choice(MORE).format(q=question) if number else question
        parts.append(f"<|user|>\n{question}\n<|assistant|>\n{answer}")
    return text + "<|endoftext|>".join(parts)


def small_turn(rng):
    questions, answers = rng.choice(SMALL_TALK)
    return Turn(rng.choice(questions), rng.choice(answers))


def document_turns(blocks, rng):
    """One turn per heading, term or signature that has an answer under it."""
    title, chapter = title_of(blocks), ""
    for at, block in enumerate(blocks):
        if block.kind not in HEADINGS and block.kind != "dt":
            continue
        if block.kind in HEADINGS:
            chapter = clean(block.text)
        text = answer_after(blocks, at)
        question = text and ask(block, title, chapter, rng)
        yield Turn(question, text) if question else None


def answer_after(blocks, at):
    """The paragraphs that follow, up to the next heading or term, cut at a paragraph's end; "" if not fit."""
    taken, size = [], 0
    for block in blocks[at + 1 :]:
        if block.kind in HEADINGS or block.kind == "dt" or size + len(block.text) > LONGEST:
            break
        taken.append(block)
        size += len(block.text) + 2
    while taken and (taken[-1].text.endswith(":") or taken[-1].text.count(" | ") > 1):
        taken.pop()  # it announces something that was cut off
    text = render(taken)
    prose = bool(taken) and taken[0].kind == "p" and re.match(r"[A-Z`(\"']", text) and " | " not in taken[0].text
    return text if prose and len(text) >= SHORTEST else ""


def ask(block, title, chapter, rng):
    """A question for a heading, a signature or a term; "" where none is natural."""
    text = clean(block.text)
    if block.kind == "dt":
        name = re.match(r"(?:[\w ]+ \*?)?`?\$?([A-Za-z_][\w.:-]*)`?\s?\(", text)
        if name and len(name[1]) > 2:
            return rng.choice(ASK_SIGNATURE).format(x=name[1])
        return rng.choice(ASK_TERM).format(x=text) if 2 < len(text) < 50 else ""
    if not 3 < len(text) < 90 or USELESS.match(text):
        return ""
    if text.endswith("?"):
        return text
    if GENERIC.match(text):
        subject = title if title and not GENERIC.match(title) else chapter
        return f"{rng.choice(('Tell me about', 'Explain', 'Describe'))} {subject}." if subject != text else ""
    how = re.match(r"(?:how (?:to|do i|can i) )(.+)", text, re.IGNORECASE)
    if how:
        return rng.choice(ASK_HOW).format(x=how[1])
    templates = ASK_DOING if re.match(r"[A-Z][a-z]+ing\b", text) else ASK_TOPIC
    return rng.choice(templates).format(x=lower_first(text) if rng.random() < 0.6 else text)


def title_of(blocks):
    first = next((b.text for b in blocks if b.kind in HEADINGS), "")
    return re.sub(r"\(\d\w*\)| Manual Page", "", clean(first)).strip()


def clean(text):
    """A heading without section numbers and trailing marks."""
    return NUMBER.sub("", text).strip(" .:")


def lower_first(text):
    """`The stack` in the middle of a sentence; names such as PostgreSQL, `C API` or git-log keep their case."""
    return text[0].lower() + text[1:] if re.match(r"[A-Z][a-z]*( [a-z]|$)", text) else text
