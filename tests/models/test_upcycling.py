"""Upcycling: the mixture of experts computes what the dense model computed, to the last bit where it says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen2MoeForCausalLM

from omnimri.jobs import upcycle as job
from omnimri.models.backbone import build_backbone
from omnimri.models.special_tokens import SPECIAL_TOKENS
from omnimri.models.tokenizer import load_tokenizer
from omnimri.models.upcycling import INDEX, UpcycleConfig, load_backbone, read_shape, upcycle
from tests.models.qwen_fakes import write_dense

IDS = torch.tensor([[5, 300, 17, 17, 2, 301, 90, 33], [8, 8, 120, 64, 7, 1, 3, 250]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def moe(folder: Path) -> Qwen2MoeForCausalLM:
    return Qwen2MoeForCausalLM.from_pretrained(folder, local_files_only=True)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "width"), [(8, 2, 24), (4, 3, 96), (5, 1, 40)])
def test_shared_keeps_every_logit_to_the_last_bit(
    tmp_path: Path, tied: bool, experts: int, top_k: int, width: int
) -> None:
    dense = write_dense(tmp_path / "dense", tied=tied)
    config = UpcycleConfig(num_experts=experts, experts_per_token=top_k, expert_width=width, noise=0.05)
    upcycle(tmp_path / "dense", tmp_path / "moe", config)
    model = moe(tmp_path / "moe")
    assert torch.equal(logits(model), logits(dense))
    assert model.config.num_experts == experts
    experts_of_a_layer = model.model.layers[0].mlp.experts
    assert not torch.equal(experts_of_a_layer.gate_up_proj[0], experts_of_a_layer.gate_up_proj[1])


@pytest.mark.parametrize("tied", [True, False])
def test_copies_keep_every_logit_up_to_rounding(tmp_path: Path, tied: bool) -> None:
    dense = write_dense(tmp_path / "dense", tied=tied)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(mode="copies", num_experts=4))
    torch.testing.assert_close(logits(moe(tmp_path / "moe")), logits(dense), rtol=0, atol=2e-5)
    upcycle(tmp_path / "dense", tmp_path / "noisy", UpcycleConfig(mode="copies", num_experts=4, noise=0.1))
    assert (logits(moe(tmp_path / "noisy")) - logits(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["shared", "copies"])
def test_every_part_of_it_learns(tmp_path: Path, mode: str) -> None:
    """A gradient reaches what starts at zero at once, and from there the rest of the routed experts and the router."""
    write_dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(mode=mode, num_experts=4))  # type: ignore[arg-type]
    model = moe(tmp_path / "moe")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


def test_names_are_those_that_transformers_writes_and_vllm_reads(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", tied=False)
    shape = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4))
    build_backbone(shape).save_pretrained(tmp_path / "own")
    found, expected = saved(tmp_path / "moe"), saved(tmp_path / "own")
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in found
    assert read_shape(tmp_path / "moe") == shape


def test_number_type_and_stop_tokens_are_the_sources(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    upcycle(tmp_path / "dense", tmp_path / "moe")
    assert {value.dtype for value in saved(tmp_path / "moe").values()} == {torch.bfloat16}
    dense, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True, dtype="auto")
        for name in ("dense", "moe")
    )
    assert (model.dtype, model.config.eos_token_id) == (torch.bfloat16, 7)
    assert torch.equal(logits(model), logits(dense))


def test_files_are_bounded_and_indexed(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    assert (tmp_path / "dense" / INDEX).is_file()
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=64, expert_width=96, max_shard_mb=1))
    files = list((tmp_path / "moe").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 1.1 * 2**20 for file in files)
    index = json.loads((tmp_path / "moe" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in saved(tmp_path / "moe").values())
    assert torch.equal(logits(moe(tmp_path / "moe")), logits(dense))


def test_special_tokens_stand_in_free_rows(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", tied=False)
    kept, drawn = UpcycleConfig(), UpcycleConfig(new_rows="draw")
    upcycle(tmp_path / "dense", tmp_path / "kept", kept)
    upcycle(tmp_path / "dense", tmp_path / "drawn", drawn)
    tokenizer = load_tokenizer(tmp_path / "kept")
    assert len(tokenizer) <= dense.config.vocab_size
    row = tokenizer.convert_tokens_to_ids("<q63>")
    first = tokenizer.convert_tokens_to_ids("<recon>")
    assert (first, row) == (len(tokenizer) - 75, len(tokenizer) - 1)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    same = logits(moe(tmp_path / "drawn")) == logits(dense)
    assert same[..., :first].all()
    assert not same[..., first : row + 1].any()
    assert same[..., row + 1 :].all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_backbone_is_filled_tensor_by_tensor(tmp_path: Path, tied: bool) -> None:
    dense = write_dense(tmp_path / "dense", tied=tied)
    shape = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4))
    backbone = build_backbone(shape)
    load_backbone(backbone, tmp_path / "moe", shape)
    assert torch.equal(logits(backbone), logits(dense))
    with pytest.raises(ValueError, match=r"another shape .*--set model.backbone.num_experts=4"):
        load_backbone(backbone, tmp_path / "moe", replace(shape, num_experts=8))
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    del weights["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(weights, tmp_path / "moe" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights are not there, for example .*experts.2.up_proj"):
        load_backbone(backbone, tmp_path / "moe", shape)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "expected a dense Qwen2 or Qwen2.5 .*found 'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_scaling"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    write_dense(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=complaint):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_folder_without_safetensors_leaves_nothing(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    for path in (tmp_path / "dense").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match="expected weights in safetensors"):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_job_says_how_to_train_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense: Qwen2ForCausalLM = write_dense(tmp_path / "dense")
    command = [str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--experts", "4", "--set", "expert_width=32"]
    assert job.main(command) == 0
    printed = capsys.readouterr().out
    assert f"--preset tiny --set backbone={tmp_path / 'moe'}" in printed
    assert "--set model.backbone.hidden_size=64" in printed
    assert f"--set model.backbone.vocab_size={dense.config.vocab_size}" in printed
    assert job.main(command) == 1
    assert "exists; choose another --out" in capsys.readouterr().err
