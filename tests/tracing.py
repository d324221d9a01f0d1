"""Interrupts at a chosen line of the code, for the tests of what an interrupt leaves behind."""

import sys


def traced(call, *files, stop=None):
    """Runs `call()`; returns the lines it ran in files whose path holds one of `files`. An interrupt comes before line number `stop`."""
    lines = []

    def trace(frame, event, argument):
        if not any(part in frame.f_code.co_filename for part in files):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == stop:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
