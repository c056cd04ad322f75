"""Lives of an engine that is killed: forked from a process that has vLLM imported, one after another.

Protocol on stdin and stdout, one JSON line each: ``go`` starts a life, ``last`` one that ends by itself when
it has loaded something; the life says its process and how many committed blocks it does not find; when it
has ended, how many answers were wrong. Where the job has several ``stacks``, an order names one: ``go disk``.
"""

import json
import os
import random
import sys

from engines import connector, drain, forget, generate, loaded, make_engine


def live(job, life, pipe, *, stack="", is_last=False):
    def say(words):
        pipe.write(json.dumps(words) + "\n")
        pipe.flush()

    tiers = job["stacks"][stack] if stack else job["tiers"]
    llm = make_engine(job["model"], tiers, **job.get("options", {}))
    planner = connector(llm)._leader.session.planner
    at = len(tiers) - 1
    with open(job["acknowledged"] + stack, "a+") as log:
        log.seek(0)
        committed = {bytes.fromhex(line.strip()) for line in log if len(line) == 65}
        if planner._tiers[at].capabilities.remote_lookup:
            committed = set()  # What is there is known when it is asked for.
        lost = sum(key not in planner._tiers[at].index for key in committed)
        watch(planner, at, log)
        say({"pid": os.getpid(), "lost": lost})
        rng = random.Random(life)
        while True:
            number = rng.randrange(len(job["prompts"]))
            right = generate(llm, [job["prompts"][number]])[0] == tuple(job["answers"][number])
            restored = sum(loaded(llm).values())
            say({"right": right, "loaded": restored})
            if is_last and restored:
                return
            if rng.random() < 0.3:
                forget(llm)
                drain(llm)


def watch(planner, at, log):
    """Write down every block that the tier says it has stored."""
    end_store = planner._endings._end_store

    def end(pending, op, position):
        if position == at:
            failed = pending.failures[position]
            for i, key in enumerate(op.keys):
                if i not in failed:
                    log.write(key.hex() + "\n")
            log.flush()
        end_store(pending, op, position)

    planner._endings._end_store = end


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout.
    import vllm  # noqa: F401 - imported once, for every life.

    for life, order in enumerate(sys.stdin):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            what, *stack = order.split()
            live(job, life, os.fdopen(write, "w"), stack="".join(stack), is_last=what == "last")
            os._exit(0)
        os.close(write)
        wrong = count = 0
        with os.fdopen(read) as pipe:
            for line in pipe:
                if not line.endswith("\n"):
                    break
                words = json.loads(line)
                if "pid" in words:
                    print(json.dumps(words), file=out, flush=True)
                else:
                    wrong += not words["right"]
                    count = words["loaded"]
        os.waitpid(pid, 0)
        print(json.dumps({"wrong": wrong, "loaded": count}), file=out, flush=True)


if __name__ == "__main__":
    main()
