"""The command-line tools: a file for each, with its arguments and the one call that does the work.

parse(argv=None)   the arguments; imports neither torch nor detectron2, so that `--help` answers at once
run(arguments)     imports what does the work, and calls it; returns the exit status
main(argv=None)    both, in a process that has imported visft
ALONE = True       where `run` needs nothing of what `import visft` registers; by default it does
"""
