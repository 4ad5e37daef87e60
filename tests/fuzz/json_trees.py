"""Wrong JSON that is nearly right: a good tree with some of its parts replaced."""

import copy
import json

ODD = [
    None,
    True,
    0,
    -1,
    0.5,
    2**63,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\windows",
    "a" * 5000,
    "é" * 50,
    [],
    {},
    [[]],
    {"": None},
    [0.5, None],
    {"kind": "cosine"},
]


def places(tree, path=()):
    """The paths of all parts of a tree."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def mutated(tree, choose):
    """A copy of `tree` with one to four changes; `choose` is an atheris.FuzzedDataProvider."""
    tree = copy.deepcopy(tree)
    for _ in range(choose.ConsumeIntInRange(1, 4)):
        *path, key = ["", *choose.PickValueInList(list(places(tree)))]
        place = tree
        for step in path[1:]:
            place = place[step]
        if not path:  # the root itself: only its members are changed
            tree[choose.ConsumeUnicode(8)] = odd(choose)
            continue
        action = choose.ConsumeIntInRange(0, 3)
        if action == 0 and isinstance(place, dict):
            place[choose.ConsumeUnicode(12)] = place.pop(key)
        elif action == 1:
            del place[key]
        else:
            place[key] = odd(choose)
    return tree


def odd(choose):
    """A value that is wrong in most places."""
    kind = choose.ConsumeIntInRange(0, 4)
    if kind == 0:
        return choose.ConsumeUnicode(30)
    if kind == 1:
        return choose.ConsumeFloat()
    if kind == 2:
        return choose.ConsumeInt(9)
    return copy.deepcopy(choose.PickValueInList(ODD))


def nested(depth):
    """JSON text of lists in lists."""
    return "[" * depth + "]" * depth


def as_bytes(tree):
    """The tree as a file holds it: half a surrogate pair stays an escape."""
    return json.dumps(tree).encode()
