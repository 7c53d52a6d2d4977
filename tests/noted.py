"""A journal that kills: the process ends right after a line of it was written."""

import os
import signal

from lingconv.execution.journal import Journal


class Noted:
    """Counts the journal's lines, and kills the process after the last one that it is to see."""

    def __init__(self, last):
        self.last = last
        self.count = 0
        self.note = Journal._note

    def __call__(self, folder, entry):
        self.note(folder, entry)
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def __get__(self, folder, kind):
        return lambda entry: self(folder, entry)
