"""The command line: one thin module for each command, which parses, calls its stage, and echoes.

Read `main.py` for the list and `command.py` for what all share: options, output, and how errors
become exit codes. Stages are imported inside functions, so that `--help` and `query` load no torch.
Nothing else in the package imports from here.
"""
