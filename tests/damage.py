"""Files damaged at random: an entry of their JSON, some of their bytes, or their length."""

import json
import random

ODD = [None, True, "", "x", -1, 0, 1.5, 1e400, 2**31, 10**18, "nan", [], [1], {}, {"k": 1}, "\ud800", "../x", "9" * 400]


def mutated(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """Change a file: an entry of its JSON, some of its bytes, or its length."""
    way = draw.random()
    if way < 0.5 and suffix == ".json":
        return odd_json(content, draw)
    if way < 0.6 and suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        head = odd_json(content[8 : 8 + length], draw)
        return len(head).to_bytes(8, "little") + head + content[8 + length :]
    if way < 0.75:
        return content[: draw.randrange(len(content))]
    if way < 0.8 and suffix == ".safetensors":
        return draw.randrange(2**64).to_bytes(8, "little") + content[8:]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 64])):
        changed[draw.randrange(min(len(changed), draw.choice([64, 1024, 10**9])))] = draw.randrange(256)
    return bytes(changed)


def odd_json(content: bytes, draw: random.Random) -> bytes:
    """Change, add or remove an entry at any depth."""
    entries = json.loads(content)
    place = entries
    while (inner := [value for value in place.values() if isinstance(value, dict)]) and draw.random() < 0.7:
        place = draw.choice(inner)
    name = draw.choice([*place, "new"])
    if draw.random() < 0.2:
        place.pop(name, None)
    elif isinstance(place.get(name), list) and draw.random() < 0.7:
        place[name] = [draw.choice([0, 1, -1, 2**40, 2**63, 7]) for _ in range(draw.choice([1, 2, 2, 3]))]
    else:
        place[name] = draw.choice(ODD)
    return json.dumps(entries).encode("utf-8", "replace")
