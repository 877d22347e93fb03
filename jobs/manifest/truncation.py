"""Files that are shorter than they say: libsndfile reads a cut WAV, AIFF, AU, CAF, MP3 or OGG without an error.

Sources: the RIFF, RF64, AIFF, CAF and .snd headers; RFC 3533 (Ogg); the Xing/Info and VBRI headers of MP3 encoders.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

UNKNOWN_SIZE = 0x7FFFF000
"""Programs that write to a pipe cannot go back to fill in a size: they leave 0xFFFFFFFF or about 2 GiB there."""

_HEAD = 4096
_OGG_PAGE = 65_307
"""The largest page of an Ogg stream, in bytes."""


def missing_part(file: BinaryIO) -> str:
    """What shows, without decoding, that the end of a file is not there; empty where nothing does.

    Args:
        file: open at any place, seekable.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return _wav(file, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        return _short(struct.unpack(">I", head[4:8])[0] + 8, size)
    if head[:4] == b"caff":
        return _caf(file, size)
    if head[:4] == b".snd":
        offset, length = struct.unpack(">II", head[4:12])
        return "" if length == 0xFFFFFFFF else _short(offset + length, size)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        said = mp3_header(file)
        # A header that counts some bytes too many is common; half a per cent is less than a lost frame in most files.
        return _short(said.size_bytes, size - said.offset, 0.995) if said and said.size_bytes else ""
    return ""


class Mp3Header:
    """What an MP3's Xing, Info or VBRI header says: where it stands, bytes and samples of the stream (0: not said)."""

    def __init__(self, offset: int, size_bytes: int, samples: int) -> None:
        self.offset, self.size_bytes, self.samples = offset, size_bytes, samples


def mp3_header(file: BinaryIO) -> Mp3Header | None:
    """The header of an MP3 that counts its frames; None where there is none, and nothing says how long it should be."""
    file.seek(0)
    start = 0
    head = file.read(10)
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    file.seek(start)
    frame = file.read(_HEAD)
    if len(frame) < 200 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return None
    version, layer = frame[1] >> 3 & 3, frame[1] >> 1 & 3
    if layer != 1 or version == 1:  # not layer III
        return None
    samples = 1152 if version == 3 else 576
    mono = frame[3] >> 6 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    place = 4 + side
    if frame[place : place + 4] in (b"Xing", b"Info"):
        flags = struct.unpack(">I", frame[place + 4 : place + 8])[0]
        after = place + 8
        frames = size_bytes = 0
        if flags & 1:
            frames = struct.unpack(">I", frame[after : after + 4])[0]
            after += 4
        if flags & 2:
            size_bytes = struct.unpack(">I", frame[after : after + 4])[0]
        return Mp3Header(start, size_bytes, frames * samples)
    if frame[36:40] == b"VBRI":
        size_bytes, frames = struct.unpack(">II", frame[46:54])
        return Mp3Header(start, size_bytes, frames * samples)
    return None


def _wav(file: BinaryIO, size: int, order: str) -> str:
    large: int | None = None
    while True:
        place = file.tell()
        head = file.read(8)
        if len(head) < 8:
            return f"it ends at byte {size}, before any sound" if place >= size else ""
        name, length = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        if name == b"ds64":
            large = struct.unpack("<Q", file.read(16)[8:])[0]
        elif name == b"data":
            if length == 0xFFFFFFFF and large is not None:
                length = large
            if length >= UNKNOWN_SIZE and large is None:
                return ""
            return _short(place + 8 + length, size)
        file.seek(place + 8 + length + length % 2)


def _caf(file: BinaryIO, size: int) -> str:
    file.seek(8)
    while len(head := file.read(12)) == 12:
        length = struct.unpack(">q", head[4:])[0]
        if head[:4] == b"data":
            return "" if length < 0 else _short(file.tell() + length, size)
        file.seek(max(0, length), 1)
    return "it ends before any sound"


def _ogg(file: BinaryIO, size: int) -> str:
    file.seek(max(0, size - _OGG_PAGE))
    tail = file.read()
    place = tail.rfind(b"OggS")
    while place >= 0:
        page = tail[place:]
        if len(page) < 27 or len(page) < 27 + page[26]:
            return "its last Ogg page is cut"
        whole = 27 + page[26] + sum(page[27 : 27 + page[26]])
        if len(page) < whole:
            return f"its last Ogg page is cut: {len(page)} of {whole} bytes"
        return "" if page[5] & 4 else "its last Ogg page is not marked as the end of the stream"
    return "no Ogg page stands at its end"


def _short(expected: int, size: int, tolerance: float = 1.0) -> str:
    if size >= expected * tolerance:
        return ""
    return f"its header promises {expected:,} bytes, the file has {size:,}"
