"""Runs an experiment in a process of its own and kills it, as no handler can see, in a batch.

`python run_until_killed.py EXPERIMENT OUT PAIRS BATCH BATCHES`: SIGKILL while batch number
BATCHES + 1 is judged, so pictures of that batch exist and its lines do not.
"""

import os
import signal
import sys
from pathlib import Path

from fastface_trt.evaluation.experiment import load_experiment
from fastface_trt.evaluation.mini import mini_dataset, mini_judges
from fastface_trt.evaluation.runner import RunOptions, run_experiment


def main(experiment, out, pairs, batch, batches):
    judges = list(mini_judges().values())
    last = judges[-1]
    judged = []
    judge = last.judge

    def judge_or_die(samples):
        judged.append(len(samples))
        if len(judged) > int(batches):
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(samples)

    last.judge = judge_or_die
    options = RunOptions(batch=int(batch), keep=100)
    run_experiment(
        load_experiment(experiment), mini_dataset(int(pairs)), judges, Path(out), options
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
