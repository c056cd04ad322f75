"""One worker as a process of its own: registers, says so, and ends when its input ends."""

import os
import sys

from kvbm_core import Member, Registry

endpoint, engine, rank = sys.argv[1:]
coordinator = Registry().coordinator({"backend": "etcd", "endpoints": [endpoint], "lease_s": 2})
coordinator.join(Member(engine=engine, rank=int(rank), world_size=1, host="here", pid=os.getpid()))
print(repr(coordinator), flush=True)
sys.stdin.read()
coordinator.close()
