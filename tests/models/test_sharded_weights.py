"""Loading into parameters that FSDP2 has cut over ranks: one process in here, two of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from infimed.contracts import UserError
from infimed.models import weights
from infimed.models.weights import load_hub_folders
from tests.conftest import noise
from tests.models.test_weights import join, llama, naflex, save_pair


def connect(rank: int, ranks: int, store: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")


def sharded(ranks: int, *, meta: bool):
    with torch.device("meta" if meta else "cpu"):
        model = join(naflex(), llama(vocab_size=67))  # 67 rows: the last rank has fewer
    mesh = init_device_mesh("cpu", (ranks,))
    for block in (*model.vision.encoder.layers, *model.language.model.layers):
        fully_shard(block, mesh=mesh)
    for part in (model.vision, model.language):
        fully_shard(part, mesh=mesh)
    return model


def count_reads(monkeypatch) -> dict[str, int]:
    """Count the elements that leave a file."""
    read, real = {"elements": 0}, weights._stored

    def counted(file, key):
        stored = real(file, key)

        def counting(rows):
            values = stored.read(rows)
            read["elements"] += values.numel()
            return values

        return weights.Stored(stored.shape, counting)

    monkeypatch.setattr(weights, "_stored", counted)
    return read


def gathered(model) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items() if "projector" not in name}


def see(model) -> torch.Tensor:
    return model.vision.eval()(noise((4, 4))).detach()


def read_text(model) -> torch.Tensor:
    ids = torch.arange(12)[None]
    borders = torch.tensor([0, 12], dtype=torch.int32)
    where = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 12, "max_length_k": 12}
    return model.language.eval()(input_ids=ids, position_ids=ids, use_cache=False, **where).logits.detach()


def work(rank: int, ranks: int, folder: Path, meta: bool) -> None:
    """One rank: load its part, gather the whole, run it; write down what it found."""
    torch.set_num_threads(1)
    connect(rank, ranks, folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        read = count_reads(patch)
        model = sharded(ranks, meta=meta)
        load_hub_folders(model, vision=folder / "vision", language=folder / "language")
        plain = torch.load(folder / "plain.pt", weights_only=True)
        whole = gathered(model)
        torch.manual_seed(1)
        found = {
            "read": read["elements"],
            "own": sum(p.to_local().numel() for part in (model.vision, model.language) for p in part.parameters()),
            "equal": whole.keys() == plain["state"].keys() and all(torch.equal(whole[k], v) for k, v in plain["state"].items()),
            "saw": torch.equal(see(model), plain["saw"]),
            "wrote": torch.equal(read_text(model), plain["wrote"]),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def prepare(folder: Path) -> int:
    """Write the folders and what a plain load makes of them; returns the number of elements."""
    model = join(naflex(), llama(vocab_size=67))
    vision, language = save_pair(folder, model)
    load_hub_folders(model, vision=vision, language=language)
    torch.manual_seed(1)
    torch.save({"state": gathered(model), "saw": see(model), "wrote": read_text(model)}, folder / "plain.pt")
    return sum(p.numel() for part in (model.vision, model.language) for p in part.parameters())


@pytest.mark.parametrize("meta", [True, False])
def test_one_rank_holds_and_reads_everything(tmp_path, meta):
    elements = prepare(tmp_path)
    work(0, 1, tmp_path, meta)
    assert json.loads((tmp_path / "rank0.json").read_text()) == {
        "read": elements, "own": elements, "equal": True, "saw": True, "wrote": True
    }  # fmt: skip


def test_two_ranks_read_their_own_rows_and_together_hold_the_whole(tmp_path):
    elements = prepare(tmp_path)
    mp.start_processes(work, (2, tmp_path, True), nprocs=2, start_method="fork")  # spawned, two imports of transformers took 27 s
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all(one["equal"] and one["saw"] and one["wrote"] for one in found)
    assert all(one["read"] == one["own"] for one in found)
    assert sum(one["read"] for one in found) == elements
    assert max(one["read"] for one in found) < 0.51 * elements


def test_a_cut_along_another_dimension_is_refused(tmp_path):
    model = join()
    vision, language = save_pair(tmp_path, model)
    connect(0, 1, tmp_path / "store")
    try:
        mlp = model.language.model.layers[1].mlp
        cut = distribute_tensor(mlp.up_proj.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(1)])
        mlp.up_proj.weight = torch.nn.Parameter(cut)
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: placed as \(Shard\(dim=1\),\); expected rows"):
            load_hub_folders(model, vision=vision, language=language)
    finally:
        dist.destroy_process_group()
