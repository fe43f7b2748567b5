"""Functions run in processes of gloo: `python gloo.py` is what `in_processes` starts."""

import os
import pickle
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))


def in_processes(size, function, *arguments, timeout=300):
    """[function(*arguments) for every process of a gloo group]. function: of a module beside this one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work").write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, folder, str(rank), str(size)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            errors = [process.communicate(timeout=timeout)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join(errors))
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(size)]


def main(folder, rank, size):
    import importlib

    torch.set_num_threads(1)
    module, name, arguments = pickle.loads(Path(folder, "work").read_bytes())
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = getattr(importlib.import_module(module), name)(*arguments)
    torch.save(found, Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
