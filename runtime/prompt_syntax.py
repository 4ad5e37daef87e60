"""Weights written into a prompt: two syntaxes of the field, and what plain text holds of them.

`a1111`, as AUTOMATIC1111's web UI reads it: `(a)` weighs 1.1, `[a]` 1/1.1, `(a:1.3)` 1.3, nested
ones multiply, `\\(` is a bracket, BREAK begins a new window. A weight w multiplies the state of its
tokens, z' = w z, and each window gets its mean back, z' · mean(z) / mean(z').

`compel`, as the library of that name reads it: `word++` weighs 1.1², `word-` 0.9, `(a phrase)1.3`
and `"a phrase"1.3` 1.3, nested ones multiply. A weight moves a token's state away from that of the
empty prompt, z' = e + w (z − e). What weighs less than 1 is besides mixed with the prompt that
lacks it: of weights w₁, w₂, … < 1, (z' + Σ tᵢ z'₋ᵢ) / (1 + Σ tᵢ) with tᵢ = tan((1 − wᵢ) π/2).

Shape legend: W windows, L = 77 positions of a window, C width of the hidden states.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import InvalidRequest

PromptSyntax = Literal["plain", "a1111", "compel"]
SYNTAXES: tuple[PromptSyntax, ...] = ("plain", "a1111", "compel")

LARGEST_WEIGHT: Final = 10.0
MOST_WEAKENED: Final = 16
"""Phrases of a compel prompt that weigh less than 1: the prompt is encoded once more for each."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a prompt whose tokens have one weight."""

    text: str
    weight: float = 1.0


Section = tuple[Fragment, ...]
"""Fragments whose tokens follow each other; a section begins a new window."""

_BREAK: Final = re.compile(r"\s*\bBREAK\b\s*")
_A1111: Final = re.compile(r"\\(.?)|([(\[])|:\s*([+-]?[.\d]+)\s*\)|([)\]])|[^\\()\[\]:]+|:", re.S)
_COMPEL_WORD: Final = re.compile(
    r'((?:\\.|[-+](?![\s(),.+\-="]|$)|[^\s\\(),.+\-="])+)(\++|-+)(?=[\s,.)]|$)', re.S
)
_COMPEL_WEIGHT: Final = re.compile(r"\++|-+|\d*\.?\d+")

_REFUSED: Final = {
    "a1111": (
        (r"<(?:lora|lyco|hypernet):[^<>]*>", "which is no part of a text", "Fuse LoRAs: --lora."),
        (r"\[[^\[\]]*[:|][^\[\]]*\]", "a text that changes between steps", "Write one text."),
        (r"\bAND\b", "two prompts to be added", "Write one prompt, or `and` in small letters."),
    ),
    "compel": (
        (
            r"\.(?:swap|blend|and|add|attend)\(|\b(?:with|use)Lora\(",
            "an operator that is not supported",
            "Use word++, word--, (a phrase)1.3, or `\\(` for a bracket.",
        ),
    ),
}
"""What a syntax has besides and is not done here: pattern, what it is, the hint."""

_SIGNS: Final = (
    ("a1111", r"\([^()]*:\s*[+-]?[.\d]+\s*\)|\({2,}[^()]+\){2,}|\[[^\[\]]+\]|\bBREAK\b"),
    ("compel", r"\([^()]+\)(?:\++|-+|\d*\.?\d+)(?![\w.])|\w[\w-]*(?:\+\+|--)[+-]*(?=[\s,.;:)]|$)"),
    ("a1111", r"<(?:lora|lyco|hypernet):[^<>]*>"),
)


def signs_in(prompt: str) -> tuple[str, PromptSyntax] | None:
    """The first thing in a plain prompt that a syntax would read, and that syntax; None if none."""
    for syntax, pattern in _SIGNS:
        if found := re.search(pattern, prompt):
            return found[0], syntax  # type: ignore[return-value]
    return None


def parse_prompt(prompt: str, syntax: PromptSyntax) -> tuple[Section, ...]:
    """The weighted pieces of a prompt; raises `InvalidRequest` for what a syntax has and we not."""
    for pattern, what, hint in _REFUSED.get(syntax, ()):
        if found := re.search(pattern, prompt):
            raise InvalidRequest(f"The prompt has {found[0]!r:.60}, {what}.", hint)
    if syntax == "plain":
        return ((Fragment(prompt),),)
    sections = _a1111(prompt) if syntax == "a1111" else (_compel(prompt),)
    fragments = [fragment for section in sections for fragment in section]
    for fragment in fragments:
        least = -LARGEST_WEIGHT if syntax == "a1111" else 0.0
        if not least <= fragment.weight <= LARGEST_WEIGHT:
            raise InvalidRequest(
                f"The prompt weighs {fragment.text.strip()!r:.40} by {fragment.weight:g}.",
                f"Weights go from {least:g} to {LARGEST_WEIGHT:g}; 0.5 to 1.5 is usual.",
            )
    if syntax == "compel" and sum(f.weight < 1 for f in fragments) > MOST_WEAKENED:
        raise InvalidRequest(
            f"The prompt weakens more than {MOST_WEAKENED} phrases.",
            "Put several into one bracket, or leave them out: each costs another encoding.",
        )
    return sections


def _a1111(prompt: str) -> tuple[Section, ...]:
    pieces: list[list[Any]] = []  # [text, weight]; None in place of a text: a new window
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, weight: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= weight

    for match in _A1111.finditer(prompt):
        escaped, opening, number, closing = match.groups()
        if escaped is not None:
            pieces.append([escaped, 1.0])
        elif opening:
            opened[opening].append(len(pieces))
        elif number and opened["("]:
            weigh(opened["("].pop(), _number(number))
        elif closing == ")" and opened["("]:
            weigh(opened["("].pop(), 1.1)
        elif closing == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / 1.1)
        else:
            for index, text in enumerate(_BREAK.split(match[0])):
                pieces += [[None, 1.0]] * (index > 0) + [[text, 1.0]]
    for bracket, weight in (("(", 1.1), ("[", 1 / 1.1)):  # those that nothing closes
        for start in opened[bracket]:
            weigh(start, weight)

    sections: list[list[Fragment]] = [[]]
    for text, weight in pieces:
        if text is None:
            sections.append([])
        elif text:
            _join(sections[-1], Fragment(text, weight), "")
    return tuple(map(tuple, sections))


def _compel(prompt: str) -> Section:
    fragments: list[Fragment] = []
    for fragment in _compel_pieces(prompt, 1.0):
        _join(fragments, fragment, " ")
    return tuple(fragments)


def _compel_pieces(text: str, scale: float) -> Iterator[Fragment]:
    place = 0
    while place < len(text):
        here = text[place]
        if here.isspace():
            place += 1
            continue
        end = _closing(text, place) if here in '("' else None
        if end is not None:
            sign = _COMPEL_WEIGHT.match(text, end + 1)
            inner = text[place + 1 : end]
            yield from _compel_pieces(inner, scale * _compel_weight(sign[0] if sign else ""))
            place = sign.end() if sign else end + 1
        elif weighed := _COMPEL_WORD.match(text, place):
            yield Fragment(_unescaped(weighed[1]), scale * _compel_weight(weighed[2]))
            place = weighed.end()
        else:
            # A comma ends a word: what follows it may be a phrase with a weight.
            word = re.compile(r"(?:\\.|[^\s,\\]|\\)+,*|,+", re.S).match(text, place)
            assert word is not None
            yield Fragment(_unescaped(word[0]), scale)
            place = word.end()


def _closing(text: str, place: int) -> int | None:
    """Where the bracket or quotation mark at `place` is closed."""
    depth = 0
    for at, here in enumerate(text[place:], place):
        if at > 0 and text[at - 1] == "\\":
            continue
        if text[place] == '"':
            if here == '"' and at > place:
                return at
        elif here in "()":
            depth += 1 if here == "(" else -1
            if depth == 0:
                return at
    return None


def _compel_weight(sign: str) -> float:
    if not sign:
        return 1.0
    if sign[0] in "+-":
        return float((1.1 if sign[0] == "+" else 0.9) ** len(sign))
    return _number(sign)


def _unescaped(text: str) -> str:
    return re.sub(r'\\([()"])', r"\1", text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"The prompt has the weight {text!r:.20}.", "Write 1.3.") from None


def _join(fragments: list[Fragment], fragment: Fragment, between: str) -> None:
    """Append, to the last fragment where the weight is the same: words may span what was read."""
    if fragments and fragments[-1].weight == fragment.weight:
        fragment = Fragment(fragments.pop().text + between + fragment.text, fragment.weight)
    fragments.append(fragment)


def weakened(sections: Sequence[Section]) -> Iterator[tuple[float, tuple[Section, ...]]]:
    """tᵢ of every fragment of a compel prompt that weighs less than 1, and the prompt without."""
    (section,) = sections
    for index, fragment in enumerate(section):
        if fragment.weight < 1:
            without = section[:index] + section[index + 1 :]
            # compel's own bound, which keeps t finite.
            yield math.tan((1 - max(fragment.weight, 1e-5)) * math.pi / 2), (without,)


def multiply(
    states_WLC: NDArray[np.float32], weights_WL: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A1111's weights on the states of one encoder: w z, with the mean of every window restored."""
    weighed = states_WLC * weights_WL[..., None]
    before, after = (x.mean((1, 2), keepdims=True, dtype=np.float64) for x in (states_WLC, weighed))
    scale = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    restored: NDArray[np.float32] = (weighed * scale).astype(np.float32)
    return restored


def interpolate(
    states_WLC: NDArray[np.float32],
    empty_LC: NDArray[np.float32],
    weights_WL: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Compel's weights: e + w (z − e), exactly z where w is 1."""
    weights = weights_WL[..., None]
    moved = empty_LC + weights * (states_WLC - empty_LC)
    return np.where(weights == 1, states_WLC, moved).astype(np.float32)
