"""Which clips are held out: by hash, so that files which are added move no others, and nothing is on both sides.

Clips that share a group, a transcript, audio or the recording that they are parts of must be on one side, and so must
clips that are tied by a chain of such sharings. The side of each such component is the hash of one of its members: of
its group where there is one, else of its recording, its text or its audio. A new clip therefore moves an old one only
where it ties two components together.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator

from jobs.manifest.store import KEYS, Store, comparable

SHARED = {"text_key": "transcript", "audio_key": "audio", "group_key": "group", "recording_key": "recording"}
"""What a user calls the keys."""


def held_out(store: Store, val_ratio: float, seed: int, allowed: Iterable[str] = ()) -> bytearray:
    """Decide the side of every clip.

    Args:
        store: the clips.
        val_ratio: share of the components that is held out.
        seed: of the split.
        allowed: what may be on both sides: `transcript`, `audio`, `recording`.

    Returns:
        1 at the ids of the clips that are held out, else 0.
    """
    size = store.last_id() + 1
    parent = array("q", range(size))
    for key in KEYS:
        if SHARED[key] not in allowed:
            tie(parent, store.shared(key))
    best = array("Q", [2**64 - 1]) * size
    place = array("Q", [0]) * size
    for number, identity in _identities(store, allowed):
        order, where = position(identity, seed)
        root = find(parent, number)
        if order <= best[root]:
            best[root], place[root] = order, where
    limit = int(val_ratio * 2**64)
    return bytearray(place[find(parent, number)] < limit for number in range(size))


def position(identity: str, seed: int) -> tuple[int, int]:
    """Two numbers below 2**64: which member of a component speaks for it (the least), and where it stands."""
    found = hashlib.sha256(f"{seed}\0{identity}".encode()).digest()
    return int.from_bytes(found[8:16], "big"), int.from_bytes(found[:8], "big")


def _identities(store: Store, allowed: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, text, text_key, audio_key, group_key, recording_key in store.places():
        if group_key:
            yield number, f"group {group_key.hex()}"
        elif recording_key and "recording" not in allowed:
            yield number, f"recording {recording_key.hex()}"
        elif text_key and "transcript" not in allowed:
            yield number, comparable(text)
        else:
            yield number, f"audio {audio_key.hex()} {comparable(text)}"


def tie(parent: array[int], pairs: Iterable[tuple[object, int]]) -> None:
    """Join the sets of neighbours that have the same key.

    Args:
        parent: a forest: each id's parent, or itself.
        pairs: (key, id), those of one key in a row.
    """
    last: tuple[object, int] | None = None
    for key, number in pairs:
        if last and last[0] == key:
            one, other = find(parent, last[1]), find(parent, number)
            # The smaller id is the root, whatever the order.
            parent[max(one, other)] = min(one, other)
        last = (key, number)


def find(parent: array[int], number: int) -> int:
    """The root of an id's set; shortens the way there."""
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


def better_seed(store: Store, decide: Callable[[int], bytearray], usable: int) -> int | None:
    """A small seed with which neither side is empty; None where there is none among a few."""
    if usable > 100_000:
        return None
    for seed in range(32):
        sides = decide(seed)
        held = sum(sides[clip.id] for clip in store.clips())
        if 0 < held < usable:
            return seed
    return None
