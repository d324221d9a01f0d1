"""Moves of a control are computed on the main thread where it is free, and in any case."""

import threading
import time

import pytest
import torch
from tornado.ioloop import IOLoop

from lora_helpers import LoRAExplorer, RichBoyNet, load_mnist
from lora_helpers.widgets import main_thread
from lora_helpers.widgets.main_thread import on_main_thread


@pytest.fixture
def loop(monkeypatch):
    loop = IOLoop(make_current=False)
    monkeypatch.setattr(main_thread, "PATIENCE", 0.2)  # the loop may start late beside other tests
    monkeypatch.setattr(main_thread, "_main_loop", lambda: loop)
    yield loop
    loop.close(all_fds=True)


def move(loop, callback, *args, main_is_free=True):
    """Calls `callback` as JupyterLab would, on a second thread; what it returned or raised, and that thread."""
    outcome = []

    def deliver():
        try:
            outcome.append(on_main_thread(callback)(*args))
        except BaseException as error:
            outcome.append(error)
        finally:
            loop.add_callback(loop.stop)

    thread = threading.Thread(target=deliver)
    if main_is_free:
        thread.start()
        loop.start()
    else:
        thread.start()
        thread.join(20)
        loop.start()  # it comes to what was withdrawn only now
    thread.join(20)
    return outcome[0], thread


def where():
    return threading.current_thread()


def test_the_main_thread_computes_when_it_is_free(loop):
    assert move(loop, where)[0] is threading.main_thread()


def test_when_it_is_busy_a_thread_of_its_own_does_and_ends(loop):
    done = []
    place, caller = move(loop, lambda: (done.append(1), where())[1], main_is_free=False)
    assert place not in (threading.main_thread(), caller) and not place.is_alive()
    assert done == [1], "once, not again when the main thread is free"


@pytest.mark.parametrize("main_is_free", [True, False])
def test_what_it_returns_or_raises_comes_back(loop, main_is_free):
    assert move(loop, lambda a, b: a + b, 2, 3, main_is_free=main_is_free)[0] == 5

    def fail():
        raise KeyboardInterrupt("stop")

    error, _ = move(loop, fail, main_is_free=main_is_free)
    assert isinstance(error, KeyboardInterrupt) and str(error) == "stop"


def test_a_long_computation_on_the_main_thread_is_waited_for(loop):
    def work():
        time.sleep(2 * main_thread.PATIENCE)
        return where()

    assert move(loop, work)[0] is threading.main_thread()


@pytest.mark.parametrize("main_is_free", [True, False])
def test_a_move_within_a_move_is_part_of_it(loop, main_is_free):
    """Else the inner one would wait, on another thread, for a lock that the outer one holds."""
    lock = threading.RLock()

    def inner():
        with lock:
            return where()

    def outer():
        with lock:
            return where(), on_main_thread(inner)()

    (place, within), _ = move(loop, outer, main_is_free=main_is_free)
    assert place is within


def test_a_preset_and_a_cell_that_moves_the_same_control_do_not_wait_for_each_other(loop):
    mnist = load_mnist()
    torch.manual_seed(0)
    explorer = LoRAExplorer(RichBoyNet(30, 40), mnist, rank=2, batches=10)
    finished = []

    def press():
        for preset in list(explorer.preset_buttons.values()):
            preset.click()
        finished.append(True)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    for batches in 20 * (0, 5, 10):  # as a cell does, while the loop of the main thread stands still
        explorer.batches = batches
    thread.join(60)
    assert finished and not explorer.status and explorer.result.settings == explorer.settings


def test_on_the_main_thread_and_without_a_kernel_it_is_just_called(loop, monkeypatch):
    assert on_main_thread(where)() is threading.main_thread()
    monkeypatch.setattr(main_thread, "_main_loop", lambda: None)
    found = []
    thread = threading.Thread(target=lambda: found.append(on_main_thread(where)()))
    thread.start()
    thread.join()
    assert found == [thread]
