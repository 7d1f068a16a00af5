import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from varl.distributed.mesh import World, barrier, join, leave
from varl.distributed.reduce import all_sum, clip_gradients, gather_metrics, sum_gradients
from varl.distributed.shard import full_state, laid_like, load_full, load_full_optimizer, whole

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What two gloo processes measured against one."""
    out = tmp_path_factory.mktemp("distributed") / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_two_processes_give_the_gradient_of_one(found, how):
    assert found["size"] == 2
    assert found["largest"] > 0.5
    assert found["gaps"][how] <= 1e-6 * max(1.0, found["largest"])
    assert found["norms"][how] == pytest.approx(found["norms"]["alone"], rel=1e-6)


def test_sharded_training_and_its_resumption_end_where_one_process_does(found):
    assert found["moved"] > 0.01
    assert found["trained"] < 1e-4 * found["moved"]
    assert found["resumed"] == 0.0


def test_sums_and_means_by_hand(found):
    assert found["sums"] == [0.2, 3.0, 1.0]
    assert found["metrics"] == {"both": 3.0, "gap/max": 1.0, "one": 7.0}


def test_a_world_of_one_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == World(rank=0, size=1, device=torch.device("cpu"))
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    sum_gradients(model.parameters())
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_gradients(model.parameters(), 2.5).item() == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[pytest.approx(1.5), pytest.approx(2.0)]]
    assert all_sum(2.0).item() == 2.0
    assert gather_metrics({"a": 1.0}, 3.0) == {"a": 1.0}
    assert whole(model.weight) is model.weight
    assert laid_like(model.weight, model.weight) is model.weight

    optimizer.step()
    other = nn.Linear(2, 1, bias=False)
    twin = torch.optim.AdamW(other.parameters())
    load_full(other, full_state(model.state_dict()))
    load_full_optimizer(twin, full_state(optimizer.state_dict()))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(twin.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    barrier()
    leave()
