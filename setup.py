"""Which packages there are: found, each once, under the names that they are imported by.

export, engines and runtime lie beside the package, and links in it make them its sub-packages in a
clone. A build goes by the folders themselves, because a checkout may hold files in place of links
(Windows), and what is reached both ways would be in the wheel twice. Everything else is in
pyproject.toml.
"""

from setuptools import find_packages, setup

PACKAGE = "fastface_trt"
FOLDERS = ("engines", "export", "runtime")

linked = [pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]
packages = [PACKAGE, *(f"{PACKAGE}.{name}" for name in find_packages(PACKAGE, exclude=linked))]
for folder in FOLDERS:
    packages += [f"{PACKAGE}.{folder}"]
    packages += [f"{PACKAGE}.{folder}.{name}" for name in find_packages(folder)]

setup(packages=packages, package_dir={f"{PACKAGE}.{folder}": folder for folder in FOLDERS})
