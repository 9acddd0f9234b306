"""Two runs in one OUTPUT_DIR: the second is refused, and a killed first one does not stand in the way."""

import socket
import time

import processes
import pytest
import runs
from tiny_run import tiny_arguments


@pytest.mark.parametrize("count", [1, 2])
def test_the_second_run_is_refused(count, shapes_train, shapes_test, tmp_path):
    run = tmp_path / "run"
    keys = {"VISFT.STAGES": "('heads',)", "DATALOADER.NUM_WORKERS": 1}
    words = [*tiny_arguments(shapes_train, shapes_test, run), *runs.words(keys)]
    resume = runs.option(words, "--resume")
    long = [*words, "VISFT.SOLVER.HEADS.MAX_ITER", "10000"]
    first = processes.start("train_net.py", long, tmp_path / "log")
    while first.is_alive() and not list(run.glob("heads/model_*.json")):
        time.sleep(0.01)
    for name, arguments in (("second", words), ("third", resume)):
        started = processes.start_group("train_net.py", arguments, tmp_path / name, count)
        for process in started:
            process.join(120)
            assert process.exitcode == 1
        logs = [log.read_text() for log in tmp_path.glob(f"{name}*")]
        assert len(logs) == count
        assert all(f"process {first.pid} on {socket.gethostname()}" in log for log in logs), logs
        assert not any("Traceback" in log for log in logs)
    assert not list(run.glob("earlier-*"))
    if count == 1:  # what only reads the run is let in
        runs.train(runs.option(words, "--eval-only", "--resume"), tmp_path / "evaluation")
        assert (run / "evaluation.json").is_file()
    assert first.is_alive(), (tmp_path / "log").read_text()

    # Killed, it leaves its loader's worker behind for some seconds, but no lock.
    first.kill()
    first.join()
    runs.train([*resume, "VISFT.SOLVER.HEADS.MAX_ITER", "1"], tmp_path / "next")
