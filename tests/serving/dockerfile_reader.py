"""Dockerfiles as lists of instructions; refuses what Docker's reference does not know."""

import json
import re
from dataclasses import dataclass

INSTRUCTIONS = {
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
}


@dataclass(frozen=True)
class Instruction:
    """`stage` counts the FROM lines before it, from 1; 0 is before the first."""

    name: str
    text: str
    stage: int

    @property
    def words(self):
        """The words, or the JSON array of the exec form."""
        return json.loads(self.text) if self.text.startswith("[") else self.text.split()


def read_dockerfile(path):
    """All instructions of a Dockerfile, in order."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found, stage = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name not in INSTRUCTIONS or not rest:
            raise ValueError(f"{path.name}: {line!r} is no instruction")
        if not found and name not in ("ARG", "FROM"):
            raise ValueError(f"{path.name} does not begin with ARG or FROM")
        stage += name == "FROM"
        found.append(Instruction(name, rest.strip(), stage))
    return found


def arguments(instructions):
    """Defaults of the ARG lines before the first stage."""
    pairs = (one.text.partition("=") for one in instructions if one.name == "ARG" and not one.stage)
    return {name: value for name, _, value in pairs}


def bases(instructions):
    """(image, name) of each stage, with the arguments put in."""
    given = arguments(instructions)
    found = []
    for one in instructions:
        if one.name == "FROM":
            image, *rest = one.words
            image = re.sub(r"\$\{(\w+)\}", lambda match: given[match[1]], image)
            found.append((image, rest[1] if rest[:1] == ["AS"] else None))
    return found
