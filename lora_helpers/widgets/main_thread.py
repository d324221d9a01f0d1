"""Moves of a control are computed on the main thread where it is free."""

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import wraps
from threading import Event, Thread, current_thread, main_thread

from IPython import get_ipython

PATIENCE = 0.02  # seconds: a main thread that is free begins within one thousandth


def on_main_thread(callback: Callable) -> Callable:
    """`callback`, but called on the main thread if that is free when a move arrives; else on a thread of its own. It is waited for.

    JupyterLab delivers moves on a second thread that stays. Were products computed there, PyTorch's teams of threads would be more
    than the cores from then on, and OpenMP would put each to sleep between any two products: a training took more than twice as
    long, in cells too. A thread that ends takes its team along.
    """

    @wraps(callback)
    def call(*args):
        loop = _main_loop()
        # A move that another one makes is part of it: handed on, it would wait for locks that the first one holds.
        if loop is None or current_thread() is main_thread() or isinstance(current_thread(), _OwnThread):
            return callback(*args)
        offered, begun = Future(), Event()

        def work() -> None:
            if offered.set_running_or_notify_cancel():  # unless it has been withdrawn
                begun.set()
                _fulfil(offered, callback, args)

        loop.add_callback(work)
        begun.wait(PATIENCE)
        if not offered.cancel():
            return offered.result()
        done = Future()
        thread = _OwnThread(target=copy_context().run, args=(_fulfil, done, callback, args))  # messages find their parent in the context
        thread.start()
        thread.join()
        return done.result()

    return call


class _OwnThread(Thread):
    """Lives for one move."""


def _main_loop():
    return getattr(getattr(get_ipython(), "kernel", None), "io_loop", None)


def _fulfil(promise: Future, callback: Callable, args: tuple) -> None:
    try:
        promise.set_result(callback(*args))
    except BaseException as error:
        promise.set_exception(error)
