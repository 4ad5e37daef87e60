import json

import numpy as np
from click.testing import CliRunner

from benchmarks.picture_encoding import BASELINE, OURS, main, measure, noise, photograph, ways


def test_the_photograph_has_what_a_photograph_has():
    picture = photograph(256).astype(float)
    assert picture.shape == (256, 256, 3)
    np.testing.assert_array_equal(picture, photograph(256))
    steps = np.abs(np.diff(picture, axis=1))
    assert 1 < np.median(steps) < 5  # noise and gradients
    assert 0.001 < (steps > 40).mean() < 0.05  # edges
    assert len(np.unique(picture)) > 200
    # Neighbours are alike; those of noise are not.
    assert np.corrcoef(picture[:, 1:].ravel(), picture[:, :-1].ravel())[0, 1] > 0.97


def test_every_way_is_measured_on_every_picture():
    chosen = list(ways())
    assert [way.name for way in chosen[:2]] == [BASELINE, OURS]
    assert len({(way.format, way.name) for way in chosen}) == len(chosen)
    results = measure({"noise": noise(32), "photograph": photograph(32)}, 1, chosen)
    assert len(results) == 2 * len(chosen)
    for one in results:
        if one.way == BASELINE:
            assert (one.faster, one.size) == (1, 1)


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "a.json"
    result = CliRunner().invoke(main, ["--turns", "1", "--side", "32", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1
    assert len(result.output.strip().splitlines()) == 2 + len(report["results"])
