"""A stand-in for an original ttserver that runs ``statestore.lua`` in real Lua 5.1, over real sockets.

No system packages ttserver any more, so what is tested against this rests on these facts. Of the chapters of Tokyo
Tyrant 1.1.41's doc/spex.html and of its sources (ttserver.c, scrext.c; Tokyo Cabinet's tcadb.c, tcbdb.c):

- Each worker thread has a Lua state of its own, into which the script has been loaded once (scrextnew). Here it is one
  for each connection, which is more of them.
- ``ext`` calls a global function with the key and the value. A name that begins with an underscore or is not that of a
  function, an error, and the results nil and false are answered with status 1; true with "true"; a number as text; a
  table with its first element (scrextcallmethod).
- The option 1 of ``ext`` holds one of a fixed number of mutexes, chosen by the key, throughout the call; 2 holds all
  of them. Binary commands take none (do_ext, recmtxidx).
- ``_get`` returns nil and ``_vsiz`` -1 where there is no record; ``_put``, ``_putkeep`` and ``_out`` return whether the
  database did it; a wrong number of arguments raises an error (serv_put and so on).
- Without a script every ``ext`` is answered with status 1.
- Each command, and each of these functions, is atomic by itself (Tokyo Cabinet's locks), fwmkeys too (tcbdbfwmkeys).
- ``stat`` names the type of the database; ``fwmkeys`` answers in byte order on B+ trees and on the in-memory tree.

All other commands are those of our own server, whose answers equal recordings of the original's
(`tests.test_transcripts`). Not imitated: second values of a key in a B+ tree. No test may send ``misc putlist`` here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lupa import lua51

from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.commands import EXT, FAILURE, STAT, SUCCESS, Reply, Request
from beaker_statestore.tyrant.original import SCRIPT
from beaker_statestore.tyrant.verbs import Executor, Reach
from beaker_statestore.tyrant.wire import encode_reply
from tests.peer import Peer
from tests.serving import carry_out

#: Mutexes for records, as RECMTXNUM.
LOCKS = 31
LONGEST = 256 * 1024 * 1024

#: What scripts are given: name -> function.
Host = dict[str, Callable[..., Any]]


def host(store: LocalStore, between: Callable[[str], None] = lambda name: None) -> Host:
    """The functions that scripts are given, bound to ``store``; before each runs, ``between`` is called with its name.

    A store answers as Tokyo Cabinet would, so whether ``put`` failed is for others to imitate.
    """

    def put(key: bytes, value: bytes) -> bool:
        store.put(key, value)
        return True

    def vsiz(key: bytes) -> int:
        value = store.get(key)
        return -1 if value is None else len(value)

    functions: Host = {
        "_get": store.get,
        "_vsiz": vsiz,
        "_put": put,
        "_putkeep": store.add,
        "_out": store.delete,
        "_log": lambda message, level=1: None,
    }

    def announced(name: str) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            between(name)
            return functions[name](*arguments)

        return function

    return {name: announced(name) for name in functions}


class LuaState:
    """A Lua state with a script in it, as scrext.c keeps it. For one thread."""

    def __init__(self, functions: Host, source: bytes) -> None:
        self._lua = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        for name, function in functions.items():
            self._lua.globals()[name.encode()] = function
        self.names_before = self.names()
        self._lua.execute(source)

    def names(self) -> set[bytes]:
        """The names of all global variables."""
        return set(self._lua.globals())

    def call(self, name: bytes, key: bytes, value: bytes) -> bytes | None:
        """What ``ext`` answers; ``None`` stands for status 1."""
        function = self._lua.globals()[name]
        if name.startswith(b"_") or lua51.lua_type(function) != "function":
            return None
        try:
            result = function(key, value)
        except lua51.LuaError:
            return None
        if lua51.lua_type(result) == "table":
            result = result[1]
        if isinstance(result, bool):
            return b"true" if result else None
        if isinstance(result, (int, float)):
            return b"%.14g" % result
        return result if isinstance(result, bytes) else None


class Original:
    """The server, to be used in a ``with``.

    :param script: its source; ``None`` for a server without.
    :param database: the type, as ``stat`` names it. Only what is in byte order is imitated.
    :param locking: whether the record lock works; tests that are to fail without it switch it off.
    """

    def __init__(
        self,
        *,
        script: bytes | None = SCRIPT.read_bytes(),
        database: str = "B+ tree",
        locking: bool = True,
    ) -> None:
        self.script = script
        self.store = MemoryStore()
        self.peer = Peer(self._answer)
        self._database = database
        self._locking = locking
        self._executor = Executor(self.store, Reach(LONGEST, LONGEST))
        self._executing = threading.Lock()
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._states = threading.local()

    @property
    def url(self) -> str:
        return str(self.peer.address)

    @property
    def requests(self) -> list[Request]:
        """Every request that has arrived."""
        return self.peer.requests

    def __enter__(self) -> Original:
        self.peer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.peer.stop()
        self.store.close()

    def _answer(self, request: Request, connection: int, number: int) -> bytes:
        if request.command is EXT:
            result = self._ext(*request.arguments)
            return encode_reply(EXT, Reply(FAILURE) if result is None else Reply(SUCCESS, result))
        with self._executing:
            (reply,) = carry_out(self._executor, request)
        if request.command is STAT:
            text = reply[5:].replace(b"type\ton-memory tree\n", b"type\t%s\n" % self._database.encode())
            reply = encode_reply(STAT, Reply(SUCCESS, text))
        return reply

    def _ext(self, name: bytes, key: bytes, value: bytes, options: int) -> bytes | None:
        if self.script is None:
            return None
        if not hasattr(self._states, "state"):
            # Where another thread may run, one does.
            self._states.state = LuaState(host(self.store, lambda name: time.sleep(0)), self.script)
        state: LuaState = self._states.state
        with self._locked(key, options):
            return state.call(name, key, value)

    @contextlib.contextmanager
    def _locked(self, key: bytes, options: int) -> Iterator[None]:
        if options & 2:
            locks = self._locks
        elif options & 1:
            locks = [self._locks[hash(key) % LOCKS]]
        else:
            locks = []
        with contextlib.ExitStack() as held:
            for lock in locks if self._locking else []:
                held.enter_context(lock)
            yield
