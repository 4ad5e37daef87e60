"""What `docker build` and `docker run` make of a Dockerfile, in folders, by debootstrap and chroot.

Each stage is a folder. A stage that starts from a published image starts from Debian's minimal root
of that image's release, with Debian's own Python where the image has one of its own. Needs root.
"""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from tests.serving.dockerfile_reader import bases, read_dockerfile

RELEASES = {
    "bookworm": ("bookworm", "http://deb.debian.org/debian"),
    "ubuntu24.04": ("noble", "http://archive.ubuntu.com/ubuntu"),
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
OURS = "/etc/certificates-of-the-builder.crt"  # a name that no package of the image writes
INHERITED = ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")


def minimal_root(image, folder):
    """Debian's or Ubuntu's minimal root of the release that an image's tag names."""
    release, mirror = next(value for key, value in RELEASES.items() if image.endswith(key))
    command = ["debootstrap", "--variant=minbase"]
    if image.startswith("python:"):
        command += ["--include=python3,python3-venv"]
    elif release == "noble":
        command += ["--components=main,universe"]
    # Debian's debootstrap may not know a release by its name; Ubuntu's all have one script.
    script = [] if release == "bookworm" else ["/usr/share/debootstrap/scripts/gutsy"]
    run([*command, release, folder, mirror, *script])
    if image.startswith("python:"):
        (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    # Names and certificates as this machine has them, so that apt and pip reach what it reaches.
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
    if Path(CERTIFICATES).is_file():
        shutil.copy(CERTIFICATES, folder / OURS[1:])


def run(command, **options):
    """`subprocess.run`, whose failure shows the end of what was said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


class Stage:
    """A folder that instructions change: its files, environment, user and working directory."""

    def __init__(self, folder, environment=None):
        self.folder = folder
        self.environment = dict(environment or {"PATH": PATH})
        self.user, self.workdir = "0:0", "/"

    def path(self, inside):
        """Where a path of the image lies on this machine."""
        return self.folder / (Path(self.workdir) / inside).relative_to("/")

    def command(self, words, **environment):
        """A command line that runs `words` in the image and becomes it, so that signals arrive."""
        shell = 'mount -t proc proc "$1/proc" && cd "$1" && shift && exec "$@"'
        pairs = [f"{key}={value}" for key, value in (self.environment | environment).items()]
        inside = ["chroot", f"--userspec={self.user}", self.folder, "env", "-i", *pairs]
        inside += ["sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *words]
        return list(map(str, ["unshare", "--mount", "sh", "-c", shell, "sh", self.folder, *inside]))

    def do(self, instruction, context, stages):
        """Carry out one instruction; those that only describe the image change nothing here."""
        name, text = instruction.name, instruction.text
        if name == "WORKDIR":
            self.workdir = text
            self.path(".").mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            for key, value in re.findall(r"(\w+)=(\S+)", text):
                known = lambda match: self.environment[match[1]]  # noqa: E731
                self.environment[key] = re.sub(r"\$(\w+)", known, value)
        elif name == "USER":
            self.user = text
        elif name == "COPY":
            *sources, target = instruction.words
            origin = Path(context)
            if sources[0].startswith("--from="):
                origin = stages[sources.pop(0).removeprefix("--from=")].folder
            for source in sources:
                destination = self.path(target) / (Path(source).name if target == "./" else "")
                destination.parent.mkdir(parents=True, exist_ok=True)
                run(["cp", "-a", "--reflink=auto", "-T", origin / source.lstrip("/"), destination])
        elif name == "RUN":
            given = {key: os.environ[key] for key in INHERITED if key in os.environ}
            run(self.command(["sh", "-c", text], PIP_CERT=OURS, **given))


def build(dockerfile, context, folder, without=""):
    """A Dockerfile's stages in order, built below `folder`, and its ENTRYPOINT with its CMD.

    `without` is an extra that pip does not install.
    """
    instructions = read_dockerfile(dockerfile)
    roots, stages, words = {}, {}, {}
    for number, (image, name) in enumerate(bases(instructions), start=1):
        if image in stages:
            origin, environment = stages[image].folder, stages[image].environment
        else:
            if image not in roots:
                roots[image] = folder / f"root-{number}"
                minimal_root(image, roots[image])
            origin, environment = roots[image], None
        stage = stages[name or ""] = Stage(folder / f"stage-{number}", environment)
        run(["cp", "-a", "--reflink=auto", origin, stage.folder])
        for one in instructions:
            if one.stage == number:
                if one.name == "RUN" and without:
                    one = replace(one, text=one.text.replace(f",{without}]", "]"))
                stage.do(one, context, stages)
                if one.name in ("ENTRYPOINT", "CMD"):
                    words[one.name] = one.words
    return list(stages.values()), words["ENTRYPOINT"] + words["CMD"]
