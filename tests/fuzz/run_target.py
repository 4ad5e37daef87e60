"""Fuzz one target: `python tests/fuzz/run_target.py NAME CORPUS [options of libFuzzer]`.

The seeds are written into the folder CORPUS, which libFuzzer then adds to. It ends with the last
run, or at the first finding, whose input lies in the current folder as crash-…; other files of the
targets lie there too.
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["fastface_trt", "PIL", "json"]):
    from tests.fuzz.fuzz_targets import targets


def main(name, corpus, *options):
    target = targets()[name]
    Path(corpus).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    defaults = [f"-runs={target.runs}", f"-max_len={target.max_len}", "-seed=1"]
    limits = ["-timeout=20", "-rss_limit_mb=1500"]
    atheris.Setup([sys.argv[0], *defaults, *limits, *options, corpus], target.make())
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
