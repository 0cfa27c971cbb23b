"""Who am I, who is there, who failed: the env contract and the line between processes."""

import socket
import threading
import time

import pytest

from jaxlm.errors import PeerLost, UserError
from jaxlm.parallel.peers import Connection, Peers, free_port
from jaxlm.parallel.place import Place, detect, devices_of

ALL = {"JAXLM_COORDINATOR": "node1:8476", "JAXLM_NUM_PROCESSES": "4", "JAXLM_PROCESS_ID": "3", "JAX_PLATFORMS": "cpu"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-010,12],login", "SLURM_STEP_NUM_TASKS": "9",
         "SLURM_PROCID": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),3", "JAX_PLATFORMS": "cpu"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_PLATFORMS": "cpu"}
JOBSET = {"JOB_COMPLETION_INDEX": "1", "JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "workers", "JAX_PLATFORMS": "cpu"}


def test_the_contract_and_every_launcher_is_recognised():
    assert detect({"JAX_PLATFORMS": "cpu"}) is None
    assert detect({**ALL, "JAXLM_NUM_PROCESSES": "1", "JAXLM_PROCESS_ID": "0"}) is None
    assert detect(ALL)[1:4] == ("node1:8476", 4, 3)
    place = detect(SLURM)
    assert place.source == "Slurm" and place.coordinator.startswith("gpu003:") and place[2:] == (9, 8, 1, 2)
    assert detect({**SLURM, "SLURM_STEP_NODELIST": "rack[1-2]n[3-4]"}).coordinator.startswith("rack1n3:")
    assert detect({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    batch_script = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
    assert detect({**batch_script, "SLURM_NTASKS": "9"}) is None  # not a task: srun starts those
    assert detect({**MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1,10.1.0.1:34911"}).coordinator.startswith("10.0.0.1:")
    assert detect({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).coordinator.startswith("127.0.0.1:")
    assert detect({**MPI, "JAXLM_COORDINATOR": "a:1"})[1:4] == ("a:1", 2, 1)
    assert detect({**JOBSET, "JAXLM_NUM_PROCESSES": "2"})[1:4] == ("run-workers-0-0.run:8476", 2, 1)


@pytest.mark.parametrize("env, message", [
    ({**ALL, "JAXLM_PROCESS_ID": ""}, "JAXLM_PROCESS_ID: is not set, though JAXLM_COORDINATOR and JAXLM_NUM_PROCESSES"),
    ({**ALL, "JAXLM_COORDINATOR": ""}, "JAXLM_COORDINATOR: is not set"),
    ({**ALL, "JAXLM_COORDINATOR": "node1"}, "JAXLM_COORDINATOR=node1: give host:port"),
    ({**ALL, "JAXLM_NUM_PROCESSES": "four"}, "JAXLM_NUM_PROCESSES=four: must be a whole number"),
    ({**ALL, "JAXLM_NUM_PROCESSES": "0"}, "JAXLM_NUM_PROCESSES=0: must be a whole number, at least 1"),
    ({**ALL, "JAXLM_PROCESS_ID": "4"}, "JAXLM_PROCESS_ID=4: must be 0 to JAXLM_NUM_PROCESSES - 1 = 3"),
    ({**ALL, **SLURM, "SLURM_PROCID": "3"}, "JAXLM_NUM_PROCESSES=4: Slurm started 9"),
    ({**SLURM, "JAXLM_PROCESS_ID": "2"}, "JAXLM_PROCESS_ID=2: Slurm says 8"),
    (MPI, "JAXLM_COORDINATOR: is not set, and Open MPI does not tell"),
    (JOBSET, "JAXLM_NUM_PROCESSES: is not set, and Kubernetes JobSet does not tell"),
])
def test_partial_or_contradictory_settings_name_the_variable(env, message):
    with pytest.raises(UserError) as error:
        detect(env)
    assert message in str(error.value) and len(error.value.problems) == 1


def test_gpus_are_dealt_out_only_where_processes_share_a_machine(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "JAXLM_LOCAL_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    alone, second = Place("x", "a:1", 2, 1), Place("x", "a:1", 4, 1, local_process=1, processes_here=2)
    assert devices_of(alone) is None and devices_of(second) == [1]
    monkeypatch.setenv("JAXLM_LOCAL_DEVICES", "4")
    assert devices_of(second) == [4, 5, 6, 7]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # the launcher did it
    assert devices_of(second) is None


class Run:
    """Peers in threads of this process. failures: (told, process, code, lines)."""

    def __init__(self, ids, count, join=20.0, peer=20.0, facts=lambda i: {}):
        self.port, self.peers, self.errors, self.failures = free_port(), {}, {}, []

        def start(i):
            try:
                self.peers[i] = Peers(i, count, f"127.0.0.1:{self.port}", join, peer, facts(i),
                                      lambda process, code, lines: self.failures.append((i, process, code, lines)))
            except (UserError, PeerLost) as error:
                self.errors[i] = error

        self.each(ids, start)

    def each(self, ids, function):
        threads = [threading.Thread(target=function, args=(i,)) for i in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self):
        self.each(self.peers, lambda i: self.peers[i].close())

    def wait_for_failures(self, count):
        end = time.monotonic() + 10
        while len(self.failures) < count and time.monotonic() < end:
            time.sleep(0.02)
        return self.failures


def test_values_are_gathered_in_order_and_all_end_together():
    run, got = Run(range(4), 4), {}
    run.each(range(4), lambda i: got.__setitem__(i, [run.peers[i].gather([i, n], f"n{n}") for n in range(3)]))
    assert all(got[i] == [[[j, n] for j in range(4)] for n in range(3)] for i in range(4))
    run.close()
    time.sleep(0.1)
    assert run.failures == [] and len({p.jax_port for p in run.peers.values()}) == 1


def test_a_missing_process_is_named_everywhere():
    began = time.monotonic()
    run = Run([0, 1, 3], 4, join=1.0)
    assert time.monotonic() - began < 5
    assert {str(e) for e in run.errors.values()} == {"expected 4 processes, 3 joined after 1 s: missing 2"}
    assert sorted(run.errors) == [0, 1, 3] and all(isinstance(e, PeerLost) for e in run.errors.values())


def test_a_missing_process_0_is_named():
    run = Run([1], 2, join=0.5)
    assert "process 0 could not be reached at 127.0.0.1" in str(run.errors[1])


def test_another_command_or_a_doubled_number_is_refused_everywhere():
    run = Run(range(2), 2, facts=lambda i: {"config": f"c{i}", "jax": "1"})
    assert len(run.errors) == 2 and all(e.problems[0].startswith("process 1 has config c1, process 0 has c0")
                                        for e in run.errors.values())
    run = Run([0, 1, 1], 3)
    assert "JAXLM_PROCESS_ID=1: given to two processes" in str(run.errors[0])


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(UserError, match="process 0 cannot listen there"):
            Peers(0, 2, f"127.0.0.1:{server.getsockname()[1]}", 1, 1, {}, None)


def test_strangers_on_the_port_do_no_harm():
    port = free_port()

    def knock():
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET / HTTP/1.0\n\n")
            sock.recv(1)

    peers = {}
    main = threading.Thread(target=lambda: peers.setdefault(0, Peers(0, 2, f"127.0.0.1:{port}", 20, 20, {}, None)))
    main.start()
    for _ in range(100):
        try:
            knock()
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
        except ConnectionResetError:
            break
    peers[1] = Peers(1, 2, f"127.0.0.1:{port}", 20, 20, {}, None)
    main.join()
    threads = [threading.Thread(target=p.close) for p in peers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_death_is_heard_at_once_and_a_silence_in_time():
    run = Run(range(3), 3, peer=60.0)
    run.peers[2].connections[0].sock.shutdown(socket.SHUT_RDWR)  # what the kernel does for a killed process
    failures = run.wait_for_failures(2)
    assert (0, 2, 1, ["process 2 ended without a word (killed, or its machine lost)"]) in failures
    run = Run(range(2), 2, peer=1.0)
    run.peers[1]._last_beat = time.monotonic() + 1000  # alive, but says nothing
    (told, process, code, lines), = run.wait_for_failures(1)
    assert (told, process, code) == (0, 1, 1) and "no sign of life for 1 s" in lines[0]


def test_a_failure_is_told_to_all_with_its_code():
    run = Run(range(3), 3)
    threading.Thread(target=run.peers[0].fail, args=(0, 2, ["data.path: empty"])).start()
    failures = run.wait_for_failures(2)
    assert sorted(failures) == [(i, 0, 2, ["data.path: empty"]) for i in (1, 2)]


def test_processes_that_part_ways_are_told():
    run = Run(range(2), 2)
    run.each(range(2), lambda i: run.peers[i].gather(None, f"place {i}"))
    assert "parted ways" in run.failures[0][3][0]
    run.close()


@pytest.mark.parametrize("asker", [0, 2])
def test_all_stop_at_the_same_step_whoever_is_ahead(asker):
    """Hosts in lock step but for a step, as collectives keep them; one asks to stop in the middle."""
    run, count, stopped = Run(range(3), 3), 3, {}
    done, cond = {i: 0 for i in range(count)}, threading.Condition()

    def host(i):
        peers = run.peers[i]
        peers.begin(1)
        for step in range(1, 10_000):
            with cond:  # a step cannot end before all have begun it
                done[i] = step
                cond.notify_all()
                cond.wait_for(lambda step=step: min(done.values()) >= step - 1)
            if i == asker and step == 20:
                peers.request_stop("SIGTERM")
            if peers.stop_after(step):
                with cond:
                    done[i] = 10**9
                    cond.notify_all()
                stopped[i] = step
                return

    run.each(range(count), host)
    assert len(stopped) == count and len(set(stopped.values())) == 1 and 20 <= stopped[0] < 10_000, stopped
    assert {p.stop_name for p in run.peers.values()} == {"SIGTERM"}
    run.close()


def test_a_message_may_come_in_pieces():
    server = socket.create_server(("127.0.0.1", 0))
    b = socket.create_connection(server.getsockname())
    connection = Connection(server.accept()[0])
    b.sendall(b'{"kind": "al')
    assert connection.receive() == []
    b.sendall(b'ive"}\n{"kind": "x"}\n')
    assert [m["kind"] for m in connection.receive()] == ["alive", "x"]
    b.close()
    assert connection.receive() is None
