"""
What the scripts share. They import this package first: while torch is imported, Ctrl-C ends them without a traceback.
"""
import sys


def show_unless_ctrl_c(kind, error, trace):
    """sys.excepthook until flags.run takes over."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show_unless_ctrl_c
