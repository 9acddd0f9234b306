"""scripts/loader_queue.py: steps wait if they ask for more than the workers make, and otherwise not."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("step, waiting", [(0.4, False), (0.0, True)])
def test_who_waits(root, step, waiting):
    words = ["--synthetic", "256", "--side", "128", "--consumers", "2", "--step", str(step), "--epochs", "2"]
    keys = ["DATALOADER.NUM_WORKERS", "1", "VISFT.INPUT.AUGMENTATION", "square", "VISFT.INPUT.SIZE", "128"]
    done = subprocess.run(
        [sys.executable, root / "scripts" / "loader_queue.py", *words, *keys], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images"] == 2 * 256 and found["workers"] == 2 and len(found["worker_mib"]) == 3
    assert found["worker_mib"][2] < found["worker_mib"][1] + 10
    assert found["steps_that_waited"] > 0.5 if waiting else found["steps_that_waited"] < 0.2
