"""Let one thread at a time use a layer or a transform that changes during a forward."""

from __future__ import annotations

from threading import Lock, get_ident
from weakref import WeakKeyDictionary


class _Turn:
    """The lock of a shared object, and who holds it: a thread, and the hook in it."""

    def __init__(self) -> None:
        self.lock, self.thread, self.user = Lock(), 0, 0


_turns: WeakKeyDictionary[object, _Turn] = WeakKeyDictionary()
_guard = Lock()


def _turn_of(shared: object) -> _Turn:
    with _guard:
        return _turns.setdefault(shared, _Turn())


def take_turn(shared: object, user: object) -> bool:
    """Wait until no other thread uses ``shared``, and use it in this one.

    A forward that is interrupted (by Ctrl-C) ends no turn; its thread goes on with the turn.

    Returns:
        Whether ``user`` holds the turn; False if another user in this thread does, within which this one is.
    """
    turn = _turn_of(shared)
    if turn.thread != get_ident():
        turn.lock.acquire()
        turn.thread, turn.user = get_ident(), id(user)
    return turn.user == id(user)


def end_turn(shared: object, user: object) -> bool:
    """End the turn of ``user``; return False if it holds none."""
    turn = _turn_of(shared)
    if (turn.thread, turn.user) != (get_ident(), id(user)):
        return False
    turn.thread, turn.user = 0, 0
    turn.lock.release()
    return True
