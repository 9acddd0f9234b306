"""Two runs in one OUTPUT_DIR: the second is refused, and a killed first one does not stand in the way."""

import socket
import time

import processes
import pytest
from tiny_run import tiny_arguments


@pytest.mark.parametrize("count", [1, 2])
def test_the_second_run_is_refused(count, shapes_train, shapes_test, tmp_path):
    run = tmp_path / "run"
    words = tiny_arguments(shapes_train, shapes_test, run) + ["DATALOADER.NUM_WORKERS", "1"]
    words += ["VISFT.STAGES", "('heads',)", "VISFT.SOLVER.HEADS.CHECKPOINT_PERIOD", "2"]
    resume = [*words[:2], "--resume", *words[2:]]
    long = [*words, "VISFT.SOLVER.HEADS.MAX_ITER", "10000"]
    first = processes.start("train_net.py", long, tmp_path / "log")
    while first.is_alive() and not list(run.glob("heads/model_*.json")):
        time.sleep(0.01)
    for name, arguments in (("second", words), ("third", resume)):
        if count == 1:
            started, logs = [processes.start("train_net.py", arguments, tmp_path / name)], [tmp_path / name]
        else:
            started = processes.start_group("train_net.py", arguments, tmp_path / name)
            logs = [tmp_path / f"{name}.{rank}" for rank in range(2)]
        for process, log in zip(started, logs, strict=True):
            process.join(120)
            assert process.exitcode == 1, log.read_text()
            assert f"process {first.pid} on {socket.gethostname()}" in log.read_text()
            assert "Traceback" not in log.read_text()
    assert not list(run.glob("earlier-*"))
    if count == 1:  # what only reads the run is let in
        status, text = processes.run(
            "train_net.py", [*words[:2], "--eval-only", "--resume", *words[2:]], tmp_path / "evaluation"
        )
        assert status == 0 and (run / "evaluation.json").is_file(), text
    assert first.is_alive(), (tmp_path / "log").read_text()

    # Killed, it leaves its loader's worker behind for some seconds, but no lock.
    first.kill()
    first.join()
    status, text = processes.run(
        "train_net.py", [*resume, "VISFT.SOLVER.HEADS.MAX_ITER", "1"], tmp_path / "next"
    )
    assert status == 0, text
