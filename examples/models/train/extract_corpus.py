#!/usr/bin/env python3
"""Extract the public-domain training text from three unpacked Debian packages.

usage: extract_corpus.py ROOT OUT

ROOT is the folder the packages were unpacked into with `dpkg -x`; OUT gets
train.txt and valid.txt. Documents are separated by a line holding only
<|endoftext|>. Every 50th document of each source is held out.
Needs nothing beyond the Python standard library.
"""

import gzip
import html
import re
import struct
import sys
import zlib
from pathlib import Path

SEPARATOR = "\n<|endoftext|>\n"
AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
JARGON = "usr/share/doc/jargon-text/jargon.txt.gz"
BIBLE = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
PUNCTUATION = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\xa0": " "}
)


def paragraphs(lines):
    """Join hard-wrapped lines; a blank line ends a paragraph."""
    held = []
    for line in [*lines, ""]:
        line = line.strip()
        if line:
            held.append(line)
        elif held:
            yield " ".join(held)
            held = []


def pieces(items, limit):
    """Group paragraphs into documents of about `limit` characters."""
    held, size = [], 0
    for item in items:
        held.append(item)
        size += len(item)
        if size >= limit:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def r_strings(blob):
    """Read the character vector of one R serialization (XDR, version 2 or 3)."""
    if blob[:2] != b"X\n":
        raise ValueError("not an XDR serialization")
    (version,) = struct.unpack_from(">i", blob, 2)
    at = 14
    if version == 3:  # the native encoding's name follows the header
        at += 4 + struct.unpack_from(">i", blob, at)[0]
    flags, count = struct.unpack_from(">ii", blob, at)
    if flags & 255 != 16:  # STRSXP
        return None
    at += 8
    strings = []
    for _ in range(count):
        _, size = struct.unpack_from(">ii", blob, at)
        at += 8
        size = max(size, 0)  # -1 is NA
        strings.append(blob[at : at + size].decode("utf-8", "replace"))
        at += size
    return strings


def austen(root):
    """Chapters of the novels in an R lazy-load database.

    Each record is a big-endian u32 (the unpacked size), then a zlib stream.
    """
    data = (root / AUSTEN).read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        if not lines or len(lines) < 1000:
            continue
        lines = [line.replace("_", "") for line in lines]
        chapter = []
        for item in paragraphs(lines):
            if re.match(r"(CHAPTER|Chapter|VOLUME|Volume|THE END|FINIS|Finis)\b", item):
                if sum(map(len, chapter)) > 2000:
                    yield "\n\n".join(chapter)
                chapter = []
                continue
            chapter.append(item)
        yield "\n\n".join(chapter)


def jargon(root):
    """The Jargon File without its table of contents."""
    text = gzip.decompress((root / JARGON).read_bytes()).decode("utf-8", "replace")
    # The contents list is a run of very short paragraphs; prose is longer.
    # Tables and rules are drawn with box characters.
    tables = re.compile("[\u2500-\u257f]")
    items = [p for p in paragraphs(text.splitlines()) if len(p) > 60 and not tables.search(p)]
    yield from pieces(items, 8000)


def bible(root):
    """Chapters of a SWORD zText module: 12-byte records (offset, size, unpacked size)."""
    for testament in ("ot", "nt"):
        index = (root / BIBLE / f"{testament}.bzs").read_bytes()
        data = (root / BIBLE / f"{testament}.bzz").read_bytes()
        for at in range(0, len(index), 12):
            offset, size, full = struct.unpack_from("<III", index, at)
            if full < 4000:
                continue
            block = zlib.decompressobj().decompress(data[offset : offset + size])
            text = block.decode("utf-8", "replace").replace("\0", " ")
            text = re.sub(r"<(note|title|reference)\b[^>]*?(?<!/)>.*?</\1>", " ", text, flags=re.S)
            # Only the text after the first chapter mark is scripture.
            for chapter in re.split(r"<chapter\b[^>]*\bsID=[^>]*>", text)[1:]:
                chapter = re.sub(r'<(?:div sID="[^"]*" type="x-p"|lg\b|p\b)[^>]*>', "\n\n", chapter)
                chapter = re.sub(r"<(l|lb)\b[^>]*>", "\n", chapter)
                chapter = html.unescape(re.sub(r"<[^>]*>", "", chapter))
                chapter = re.sub(r"[ \t]+", " ", chapter)
                chapter = re.sub(r" *\n *", "\n", chapter)
                chapter = re.sub(r"\n{2,}", "\n\n", chapter).strip()
                if len(chapter) > 200:
                    yield chapter


def main():
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    train, valid = [], []
    for name, source in (("austen", austen), ("jargon", jargon), ("bible", bible)):
        documents = [d.translate(PUNCTUATION) for d in source(root)]
        for number, document in enumerate(documents):
            (valid if number % 50 == 25 else train).append(document)
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents))} characters")
    for name, documents in (("train", train), ("valid", valid)):
        text = SEPARATOR.join(documents)
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(documents)} documents, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
