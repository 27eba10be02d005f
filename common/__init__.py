"""
What the scripts share. They import this package first: while torch is imported, Ctrl-C ends them without a traceback.
"""
import sys

show = sys.excepthook


def show_unless_ctrl_c(kind, error, trace):
    """Ctrl-C that comes before flags.run can catch it prints nothing; all else is shown as before."""
    if not issubclass(kind, KeyboardInterrupt):
        show(kind, error, trace)


sys.excepthook = show_unless_ctrl_c
