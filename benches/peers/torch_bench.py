"""One rank of a collective under PyTorch: torch_bench.py gloo|deepspeed COLLECTIVE SIZE,... BATCHES TOUCH.

Measures and reports as mpi_bench.c does, with Gloo's collectives or DeepSpeed's shared-memory all-reduce.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

BATCH_SECONDS = 0.06


def make_call(library, collective, x, ranks, me):
    """The call on input `x`, and what its result must be, given every rank's input."""
    if library == "deepspeed":
        import deepspeed.comm

        return lambda: deepspeed.comm.inference_all_reduce(x), lambda inputs: (x, sum(inputs))
    block = x.numel() // ranks
    mine = slice(me * block, (me + 1) * block)
    if collective == "all_reduce":
        return lambda: dist.all_reduce(x), lambda inputs: (x, sum(inputs))
    if collective == "all_gather":
        out = [torch.zeros_like(x) for _ in range(ranks)]
        return lambda: dist.all_gather(out, x), lambda inputs: (torch.cat(out), torch.cat(inputs))
    if collective == "broadcast":
        return lambda: dist.broadcast(x, 0), lambda inputs: (x, inputs[0])
    if collective == "reduce_scatter":
        out = torch.zeros(block)
        return lambda: dist.reduce_scatter_tensor(out, x), lambda inputs: (out, sum(inputs)[mine])
    if collective == "all_to_all":
        out = torch.zeros_like(x)
        right = lambda inputs: (out, torch.cat([i[mine] for i in inputs]))
        return lambda: dist.all_to_all_single(out, x), right
    sys.exit(f"torch_bench: no {collective} here")


def slowest_mean(call, x, calls, touch):
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        if touch:
            x.zero_()
        call()
    mean = torch.tensor([(time.perf_counter() - start) / calls], dtype=torch.float64)
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)
    return mean.item()


def main():
    library, collective, sizes, batches, touch = sys.argv[1:]
    torch.set_num_threads(1)
    if library == "deepspeed":
        os.environ.setdefault("LOCAL_SIZE", os.environ["WORLD_SIZE"])
        import deepspeed.comm

        deepspeed.comm.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    me, ranks = dist.get_rank(), dist.get_world_size()
    for size in sizes.split(","):
        count = int(size) // 4
        if collective in ("reduce_scatter", "all_to_all"):
            count = count // ranks * ranks
        if count == 0:
            continue
        inputs = [((torch.arange(count) * 7 + r * 13) % 1009).float() for r in range(ranks)]
        x = inputs[me].clone()
        call, result = make_call(library, collective, x, ranks, me)
        call()
        got, right = result(inputs)
        if not torch.equal(got, right):
            sys.exit(f"torch_bench: {collective}: rank {me} has a wrong result")
        x.zero_()
        calls = 4
        for _ in range(2):
            fit = BATCH_SECONDS / slowest_mean(call, x, calls, touch == "1")
            calls = max(3, min(100_000, int(fit)))
        means = sorted(slowest_mean(call, x, calls, touch == "1") for _ in range(int(batches)))
        if me == 0:
            print(json.dumps({"bytes": count * 4, "median_us": means[len(means) // 2] * 1e6}), flush=True)
    # A rank that leaves while another still reports would take that one with it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
