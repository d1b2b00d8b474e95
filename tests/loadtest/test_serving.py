import os
import subprocess
import sys
import time

from loadtest.serving import cpu_time

SPIN = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"


def test_processor_time_is_that_of_a_process_and_of_those_below_it() -> None:
    before = cpu_time(os.getpid())
    with subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = cpu_time(os.getpid()).since(before)
        assert spent.children >= 0.15 and spent.own < spent.children
        assert cpu_time(child.pid).own >= 0.15
        child.communicate(b"\n")
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert cpu_time(os.getpid()).since(before).own >= 0.08
