"""The line between the processes of a run: one TCP connection from each to process 0, open from start to end.

JAX's own service aborts the survivors of a lost process without saying which one it was, and its start-up barrier aborts
without saying who is missing. Over this line the processes wait for each other, agree on values and on the step to stop
at, and hear at once when one of them fails, dies (the connection ends) or hangs (no sign of life). Lines of JSON.
"""

import json
import selectors
import socket
import threading
import time

from jaxlm.errors import PeerLost, UserError

LINGER_SECONDS = 5.0  # process 0 outlives a failure by this long, so that everyone hears of it


class Connection:
    def __init__(self, sock: socket.socket):
        sock.settimeout(LINGER_SECONDS)  # of a send: nobody waits long on a full buffer
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.buffer, self.sending, self.heard = sock, b"", threading.Lock(), time.monotonic()

    def send(self, kind: str, **message) -> None:
        """A connection that is gone shows when it is read from."""
        try:
            with self.sending:
                self.sock.sendall(json.dumps({"kind": kind, **message}).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[dict] | None:
        """What has arrived, to be called when the socket is readable; None at its end."""
        try:
            chunk = self.sock.recv(2**16)
        except OSError:
            return None
        if not chunk:
            return None
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive_one(self, deadline: float) -> dict | None:
        """Waits for one message; None at the end of the connection or of the time."""
        while (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(left)
            messages = self.receive()
            self.sock.settimeout(LINGER_SECONDS)
            if messages is None:
                return None
            if messages:
                return messages[0]
        return None


class Peers:
    """Joins all processes, then keeps the line in a thread of its own.

    Args:
        coordinator: "host:port" of process 0. facts: {name: value} that must be the same in all processes.
        join_seconds: time for all to come. peer_seconds: silence after which a process counts as lost.
        on_failure: called in the line's thread as (process, exit code, lines) when another process fails or is lost.
    Raises UserError (port taken, facts differ, two of one number) or PeerLost (not all came).
    """

    def __init__(self, process_id: int, num_processes: int, coordinator: str, join_seconds: float, peer_seconds: float,
                 facts: dict, on_failure):
        self.process_id, self.num_processes, self.on_failure = process_id, num_processes, on_failure
        self.peer_seconds, self.beat_seconds = peer_seconds, min(10.0, peer_seconds / 6)
        self.connections: dict[int, Connection] = {}
        self.cond = threading.Condition()
        self.silent: set[int] = set()
        self.closing = self.failing = False
        self._gathers = 0  # of this process, done or under way
        self._values: dict[int, dict] = {}  # process 0: gather number -> {process: (label, value)}
        self._results: dict[int, list] = {}
        self._first, self._claimed, self._steps_claimed = 0, 0, {}
        self._asked, self._pausing, self._stop_at, self.stop_name = False, False, None, ""
        self.selector = selectors.DefaultSelector()
        host, port = coordinator.rsplit(":", 1)
        if process_id == 0:
            self.jax_port = self._accept_all(host, int(port), join_seconds, facts)
        else:
            self.jax_port = self._join(host.strip("[]"), int(port), join_seconds, facts)
        for connection in self.connections.values():
            self.selector.register(connection.sock, selectors.EVENT_READ, connection)
        self._last_beat = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="jaxlm-peers", daemon=True)
        self.thread.start()

    # ---- Joining ---------------------------------------------------------------------------------------------------------

    def _accept_all(self, host, port, join_seconds, facts) -> int:
        loopback = host in ("127.0.0.1", "localhost")
        try:
            if not loopback and socket.has_dualstack_ipv6():
                server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            else:
                server = socket.create_server((host if loopback else "", port), backlog=1024)
        except OSError as error:
            raise UserError(f"JAXLM_COORDINATOR={host}:{port}: process 0 cannot listen there ({error.strerror}); choose "
                            "another port") from error
        deadline, waiting = time.monotonic() + join_seconds, []
        self.selector.register(server, selectors.EVENT_READ)
        problem = None
        while not problem and len(self.connections) < self.num_processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(i) for i in range(1, self.num_processes) if i not in self.connections)
                problem = PeerLost(f"expected {self.num_processes} processes, {len(self.connections) + 1} joined after "
                                   f"{join_seconds:.0f} s: missing {missing}")
                break
            for key, _ in self.selector.select(left):
                if key.data is None:
                    connection = Connection(server.accept()[0])
                    waiting.append(connection)
                    self.selector.register(connection.sock, selectors.EVENT_READ, connection)
                    continue
                try:
                    messages = key.data.receive()
                    hello = messages[0] if messages else None
                    if hello:
                        process, theirs = int(hello["process"]), hello["facts"]
                except (ValueError, KeyError, TypeError):
                    messages = None  # not one of ours
                if messages == []:
                    continue
                self.selector.unregister(key.fileobj)
                if messages is None:
                    key.fileobj.close()
                    waiting.remove(key.data)
                    continue
                problem = self._misfit(process, theirs, facts)
                self.connections.setdefault(process, key.data)
        server.close()
        self.selector.close()
        self.selector = selectors.DefaultSelector()
        if problem:
            lines = list(problem.problems) if isinstance(problem, UserError) else [str(problem)]
            for connection in waiting:
                connection.send("refused", user=isinstance(problem, UserError), lines=lines)
                connection.sock.close()
            raise problem
        port = free_port()
        for connection in self.connections.values():
            connection.send("welcome", jax_port=port)
        return port

    def _misfit(self, process, theirs, facts) -> UserError | None:
        if process in self.connections or not 0 < process < self.num_processes:
            return UserError(f"JAXLM_PROCESS_ID={process}: given to two processes; each has its own, 0 to "
                             f"{self.num_processes - 1}")
        differ = [name for name in facts if name not in theirs or theirs[name] != facts[name]]
        if differ:
            return UserError(*(f"process {process} has {name} {theirs.get(name)}, process 0 has {facts[name]}; start every "
                               "process with the same command, packages and environment" for name in differ))
        return None

    def _join(self, host, port, join_seconds, facts) -> int:
        deadline, reason = time.monotonic() + join_seconds, "no answer"
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerLost(f"process {self.process_id}: process 0 could not be reached at {host}:{port} for "
                               f"{join_seconds:.0f} s ({reason})")
            try:
                sock = socket.create_connection((host, port), timeout=min(5.0, left))
            except OSError as error:  # not up yet, or its name not known yet
                reason = error.strerror or str(error)
                time.sleep(min(0.2, left))
                continue
            if sock.getsockname() == sock.getpeername():  # a port dialled from itself
                sock.close()
                continue
            connection = Connection(sock)
            connection.send("hello", process=self.process_id, facts=facts)
            answer = connection.receive_one(time.monotonic() + join_seconds + LINGER_SECONDS)
            if answer is None:
                reason = "it hung up"
                sock.close()
                time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
                continue
            if answer["kind"] == "refused":
                raise UserError(*answer["lines"]) if answer["user"] else PeerLost(*answer["lines"])
            self.connections[0] = connection
            return answer["jax_port"]

    # ---- The thread ------------------------------------------------------------------------------------------------------

    def _run(self):
        while self.connections or not self.closing:
            self._turn()

    def _turn(self):
        """Read what has come, send a sign of life, look who is silent."""
        for key, _ in self.selector.select(self.beat_seconds / 2 if self.connections else 0.1):
            process = next((i for i, c in self.connections.items() if c is key.data), None)
            if process is None:  # dropped a moment ago
                continue
            messages = key.data.receive()
            if messages is None:
                self._drop(process)
                if not self.closing and not self.failing:
                    self.on_failure(process, 1, [f"process {process} ended without a word (killed, or its machine lost)"])
            for message in messages or ():
                self._handle(process, message)
        now = time.monotonic()
        if now - self._last_beat >= self.beat_seconds:
            self._last_beat = now
            for connection in list(self.connections.values()):
                connection.send("alive")
        for process, connection in list(self.connections.items()):
            if now - connection.heard > self.peer_seconds and process not in self.silent and not self.failing:
                self.silent.add(process)
                self.on_failure(process, 1, [f"process {process}: no sign of life for {self.peer_seconds:.0f} s "
                                             "(stopped, or its machine or network hangs)"])

    def _drop(self, process):
        with self.cond:
            connection = self.connections.pop(process)
            self.cond.notify_all()
        self.selector.unregister(connection.sock)
        connection.sock.close()

    def _handle(self, process, message):
        match message["kind"]:
            case "gather":
                self._collect(process, message["number"], message["label"], message["value"])
            case "gathered":
                self._deliver(message["number"], message["label"], message["values"])
            case "stop":
                self._ask_all_to_pause(message["name"])
            case "pause":
                self._pause(message["name"])
            case "paused":
                self._decide_stop(process, message["claimed"])
            case "stop_at":
                self._set_stop(message["step"])
            case "fail" if self.failing:
                self._drop(process)
            case "fail":
                self.on_failure(message["process"], message["code"], message["lines"])

    def _broadcast(self, kind, **message):
        for connection in list(self.connections.values()):
            connection.send(kind, **message)

    # ---- Agreeing on values ----------------------------------------------------------------------------------------------

    def gather(self, value, label: str) -> list:
        """The JSON value of every process, in their order; all must call it, in the same order."""
        self._gathers += 1
        number = self._gathers
        if self.process_id == 0:
            self._collect(0, number, label, value)
        else:
            self.connections[0].send("gather", number=number, label=label, value=value)
        with self.cond:
            self.cond.wait_for(lambda: number in self._results)
            return self._results.pop(number)

    def _collect(self, process, number, label, value):
        with self.cond:
            values = self._values.setdefault(number, {})
            values[process] = label, value
            if len(values) < self.num_processes:
                return
            del self._values[number]
        labels = sorted({label for label, _ in values.values()})
        if len(labels) > 1:
            self.on_failure(0, 1, [f"the processes have parted ways: some are at {labels[0]!r}, some at {labels[1]!r}"])
        ordered = [values[i][1] for i in range(self.num_processes)]
        self._broadcast("gathered", number=number, label=label, values=ordered)
        self._deliver(number, label, ordered)

    def _deliver(self, number, label, values):
        with self.cond:
            self.closing = label == "end"  # from here on a connection may end
            self._results[number] = values
            self.cond.notify_all()

    # ---- Agreeing on the step to stop at ---------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """The loop starts: step `step` will be the first."""
        with self.cond:
            self._first = self._claimed = step

    def request_stop(self, name: str) -> None:
        """Any process may ask, and several may."""
        if self.process_id == 0:
            self._ask_all_to_pause(name)
        else:
            self.connections[0].send("stop", name=name)

    def stop_after(self, step: int) -> bool:
        """To be asked once the step was sent to the device: is it the last? Claims the next one if not. Hosts are at most
        a step apart, so all finish the furthest step that any of them has claimed."""
        with self.cond:
            self.cond.wait_for(lambda: not self._pausing or self._stop_at is not None)
            if self._stop_at is not None and step >= max(self._stop_at, self._first):
                return True
            self._claimed = step + 1
            return False

    def _ask_all_to_pause(self, name):
        with self.cond:
            if self._asked:
                return
            self._asked = True
        self._broadcast("pause", name=name)
        self._pause(name)

    def _pause(self, name):
        with self.cond:
            self._pausing, self.stop_name = True, name
            claimed = self._claimed
        if self.process_id == 0:
            self._decide_stop(0, claimed)
        else:
            self.connections[0].send("paused", claimed=claimed)

    def _decide_stop(self, process, claimed):
        with self.cond:
            self._steps_claimed[process] = claimed
            if len(self._steps_claimed) < self.num_processes:
                return
        step = max(self._steps_claimed.values())
        self._broadcast("stop_at", step=step)
        self._set_stop(step)

    def _set_stop(self, step):
        with self.cond:
            self._stop_at = step
            self.cond.notify_all()

    # ---- Ending ----------------------------------------------------------------------------------------------------------

    def fail(self, process: int, code: int, lines: list[str]) -> None:
        """Tell all that `process` failed, and wait (shortly) until they have heard. The caller then exits."""
        with self.cond:
            self.failing = True
        self._broadcast("fail", process=process, code=code, lines=lines)
        deadline = time.monotonic() + LINGER_SECONDS
        if threading.current_thread() is self.thread:
            while self.connections.keys() - self.silent and time.monotonic() < deadline:
                self._turn()
        else:
            with self.cond:
                self.cond.wait_for(lambda: not self.connections.keys() - self.silent, LINGER_SECONDS)

    def close(self) -> None:
        """All have come to the end; returns when all are there."""
        self.gather(None, "end")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
