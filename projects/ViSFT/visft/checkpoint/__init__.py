"""Safe reading and atomic writing of weights, checkpoints of a run, the authors' files, and pretrained CLIPs."""
