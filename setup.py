"""Which packages there are, found, each once, under the names that they are imported by; README.

export, engines and runtime lie beside the package, and links in it make them its sub-packages in a
clone. A build goes by the folders themselves, because a checkout may hold files in place of links
(Windows); where it holds links, what is found both ways is named once.

A package index shows README without the files beside it, so its relative links and pictures are
made absolute, below `Repository` of [project.urls] in pyproject.toml, once there is one. Everything
else is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "fastface_trt"
FOLDERS = ("engines", "export", "runtime")

packages = {PACKAGE, *(f"{PACKAGE}.{name}" for name in find_packages(PACKAGE))}
for folder in FOLDERS:
    inside = (f"{folder}.{name}" for name in find_packages(folder))
    packages |= {f"{PACKAGE}.{name}" for name in (folder, *inside)}


def readme_for_an_index(text: str, repository: str | None) -> str:
    """README with the relative links of `text` below `repository`, if that is known."""
    if repository is None:
        return text

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({repository.rstrip('/')}/{view}/HEAD/{link[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", absolute, text)


here = Path(__file__).parent
address = re.search(r'^Repository = "([^"]+)"', (here / "pyproject.toml").read_text("utf-8"), re.M)

if __name__ == "__main__":  # a test imports this file
    setup(
        packages=sorted(packages),
        package_dir={f"{PACKAGE}.{folder}": folder for folder in FOLDERS},
        long_description=readme_for_an_index(
            (here / "README.md").read_text("utf-8"), address and address[1]
        ),
        long_description_content_type="text/markdown",
    )
