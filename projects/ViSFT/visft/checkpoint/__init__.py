"""Safe reading and atomic writing of weights, checkpoints of a run, and the authors' files."""
