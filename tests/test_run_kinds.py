"""`gradmend run` with trainings of many kinds: the same to the last bit, and every step seen."""

import os
import subprocess
import sys
from pathlib import Path

from running import ROOT, plain, script, watched
from trainings import KINDS


def test_only_the_first_of_several_processes_is_watched(tmp_path: Path) -> None:
    code = f"""
import os
import torch
import torch.distributed as dist
from torch import nn

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
print(model.module.weight.double().sum().item())
dist.destroy_process_group()
"""
    command = [sys.executable, "-m", "gradmend", "run", script(tmp_path, code)]
    ranks = [{**os.environ, "RANK": rank, "OMP_NUM_THREADS": "1"} for rank in "01"]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, env=rank, stdout=pipe, stderr=pipe, text=True) for rank in ranks]
    said = [process.communicate(timeout=100) for process in started]
    assert said[0][0] == said[1][0] != ""
    assert "gradmend: Linear, 5 steps" in said[0][1]
    assert "gradmend" not in said[1][1]


def test_all_kinds_of_trainings_come_to_the_same() -> None:
    file = str(ROOT / "tests" / "trainings.py")
    done, alone = watched([file]), plain([file])
    assert done.stdout == alone.stdout
    assert len(done.stdout.splitlines()) == len(KINDS)
    seen = [line.partition(",")[0].split()[1] for line in done.stderr.splitlines() if " steps, last" in line]
    expected = {"Sequential": 9, "Linear": 3, "Checkpointed": 1, "GRU": 1}
    assert {name: seen.count(name) for name in seen} == expected
