"""The plan of a run: counts of the real modules, DeepSpeed's own memory estimates, and refusals that name a knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch.utils.flop_counter import FlopCounterMode

from omnimri.jobs import plan as job
from omnimri.models.backbone import add_adapters, build_backbone
from omnimri.models.config import preset
from omnimri.models.omnimri import OmniMRI
from omnimri.platform.training.optimizer import parameter_groups, train_only
from omnimri.platform.training.plan import (
    PlanConfig,
    count,
    format_plan,
    layer_activations,
    make_plan,
    model_states,
    step_flops,
    trunk_levels,
)
from omnimri.platform.training.recipes import recipe
from omnimri.platform.training.stages import STAGES

TOTAL, LARGEST = 14_000_000_000, 545_000_000


def test_counts_are_those_of_the_model() -> None:
    config = preset("tiny")
    counts, model = count(config), OmniMRI(config)
    assert sum(counts.parts.values()) == sum(p.numel() for p in model.parameters())
    layers = model.backbone.model.layers
    idle = sum(p[2:].numel() for layer in layers for p in layer.mlp.experts.parameters())
    assert counts.active == counts.parts["backbone"] - idle


def test_7b_is_counted_without_memory() -> None:
    counts = make_plan("7b", PlanConfig(gpus=64)).counts
    assert 13e9 < counts.parts["backbone"] < 14e9
    assert 8.5e9 < counts.active < 9.5e9


def test_a_decoder_of_volumes_is_counted_and_needs_more() -> None:
    plain, volumes = (make_plan("tiny", PlanConfig(gpus=1, zero=1, segment_dims=dims)) for dims in (2, 3))
    model = OmniMRI(volumes.config)
    assert volumes.counts.parts["image_decoder"] == sum(p.numel() for p in model.image_decoder.parameters())
    assert volumes.counts.parts["image_decoder"] > plain.counts.parts["image_decoder"]
    part = "activations, image decoder"
    assert volumes.memory[part] == pytest.approx(8 * plain.memory[part])  # the finest level of 8 whole slices
    assert step_flops(volumes.config, volumes.counts, volumes.settings) > step_flops(
        plain.config, plain.counts, plain.settings
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_work_of_the_segmentation_trunk_is_that_of_its_convolutions(dims: int) -> None:
    """Within a third of what torch counts for one slice or patch, without prompt and pyramid."""
    config = preset("tiny")
    config = replace(config, image_decoder=replace(config.image_decoder, segment_dims=dims))  # type: ignore[arg-type]
    trunk = OmniMRI(config, ("image_decoder",)).image_decoder.segment_trunk
    trunk.inject = torch.nn.ModuleList()
    shape = config.inputs.slice_shape if dims == 2 else config.patch_shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(torch.zeros(1, 9, *shape), torch.ones(1), torch.zeros(1, 16, config.connector.dim), [])
    planned = sum(2 * 5 * taps * channels**2 * places for channels, places, taps in trunk_levels(config))
    assert planned == pytest.approx(counter.get_total_flops(), rel=1 / 3)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 8), (8, 8)])
def test_states_differ_from_deepspeeds_estimate_by_the_width_of_a_weight(nodes: int, per_node: int) -> None:
    """DeepSpeed counts 16-bit weights and a float32 copy of their gradients; ours are float32 from the start."""
    workers = nodes * per_node
    _, zero2 = estimate_zero2_model_states_mem_needs(TOTAL, per_node, nodes, cpu_offload=False)
    own = sum(model_states(TOTAL, TOTAL, LARGEST, zero=2, workers=workers).values())
    assert own - zero2 == pytest.approx(2 * TOTAL - 2 * TOTAL / workers, abs=1)
    _, zero3, layer = estimate_zero3_model_states_mem_needs(TOTAL, LARGEST, per_node, nodes, False, False)
    states = model_states(TOTAL, TOTAL, LARGEST, zero=3, workers=workers)
    assert states["gathered layer"] == layer
    assert sum(states.values()) - zero3 == pytest.approx(2 * TOTAL / workers, abs=1)
    _, offloaded, _ = estimate_zero3_model_states_mem_needs(TOTAL, LARGEST, per_node, nodes, True, True)
    states = model_states(TOTAL, TOTAL, LARGEST, zero=3, workers=workers, offload=True)
    assert states["gathered layer"] == offloaded
    assert states["weights"] == states["optimizer"] == 0


def test_activations_of_a_layer_are_what_autograd_keeps() -> None:
    """Within a fifth, at the tiny width in float32."""
    config = preset("tiny")
    torch.manual_seed(0)
    backbone = build_backbone(config.backbone)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = 256
    states = torch.randn(1, tokens, config.backbone.hidden_size, requires_grad=True)
    position = backbone.model.rotary_emb(states, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone.model.layers[0](states, position_embeddings=position)
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = sum(size for place, size in seen.items() if place not in weights)
    assert output.requires_grad
    assert layer_activations(config, value_bytes=4) * tokens == pytest.approx(kept, rel=0.2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("also", [(), ("vision",), ("vision", "text_encoder", "backbone")])
def test_states_are_those_of_a_real_optimizer_under_what_else_learns(stage: str, also: tuple[str, ...]) -> None:
    """Gradients and AdamW's two moments of the model as training freezes it, without ZeRO."""
    train = replace(recipe("tiny", "run", [], "out").stage(stage), also_trains=also)
    with torch.device("meta"):
        model = OmniMRI(preset("tiny"))
    train_only(model.parts(), train.trained_parts(STAGES[stage]))
    optimizer = torch.optim.AdamW(parameter_groups(model, model.parts(), train), foreach=False)
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    plan = make_plan("tiny", PlanConfig(gpus=1, zero=0, stage=stage, also_trains=also))
    assert plan.memory["optimizer"] == moments
    assert plan.memory["gradients"] == sum(p.grad.nbytes for p in learning)
    assert plan.memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert ("activations, vision" in plan.memory) == ("vision" in (*also, *STAGES[stage].trains))
    starred = {line.split("*")[0].strip() for line in format_plan(plan).splitlines() if "*  " in line}
    assert starred == set(train.trained_parts(STAGES[stage]))


def test_adapters_are_counted_as_they_are_trained() -> None:
    """Against the parameters that learn in the real model."""
    plain, adapted = (make_plan("tiny", PlanConfig(gpus=1, zero=1, lora_rank=rank)) for rank in (None, 4))
    model = OmniMRI(plain.config)
    train_only(model.parts(), PlanConfig(gpus=1).learning)
    add_adapters(model.backbone, 4)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapted.counts.learning(adapted.settings) == learning
    assert adapted.states(1)["optimizer"] == 12 * learning
    assert adapted.states(1)["weights"] == 4 * sum(p.numel() for p in model.parameters())
    ratio = step_flops(adapted.config, adapted.counts, adapted.settings) / step_flops(
        plain.config, plain.counts, plain.settings
    )
    assert 0.6 < ratio < 1
    not_there = PlanConfig(gpus=1, stage="align", lora_rank=4)  # stage 2 does not train the backbone
    assert adapted.counts.added(not_there) == 0
    assert "adapters* (backbone frozen)" in format_plan(adapted)
    with pytest.raises(ValueError, match="lora_rank must be 1 or more"):
        PlanConfig(gpus=1, lora_rank=0)


def test_the_encoder_in_a_later_stage_costs_memory_and_work() -> None:
    frozen, learning = (make_plan("small", PlanConfig(gpus=8, also_trains=also)) for also in ((), ("vision",)))
    assert learning.needed > frozen.needed
    flops = [step_flops(plan.config, plan.counts, plan.settings) for plan in (frozen, learning)]
    assert flops[1] > flops[0]
    with pytest.raises(ValueError, match=r"PlanConfig.also_trains: unknown parts \['eyes'\]; known: \['vision'"):
        PlanConfig(gpus=8, also_trains=("eyes",))


def test_checkpointing_offload_and_more_workers_need_less() -> None:
    def needed(**settings: object) -> float:
        return make_plan("small", PlanConfig(**{"gpus": 8, "zero": 2, **settings})).needed  # type: ignore[arg-type]

    assert needed(checkpointing=False) > needed() > needed(gpus=16) > needed(gpus=16, zero=3)
    assert needed(offload="cpu") < needed()
    assert needed(zero=0) > needed(zero=1) > needed()


def test_the_job_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--preset", "small", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    for expected in ("active per token", "ZeRO-3", "checkpointed", "35% of 312 TFLOP/s (assumed)", "per step"):
        assert expected in printed
    assert job.main(["--preset", "small", "--gpus", "8", "--set", "also_trains=vision"]) == 0
    assert "vision*" in capsys.readouterr().out
    assert "vision*" not in printed


@pytest.mark.parametrize(
    ("options", "knob"),
    [
        (["--zero", "0"], "--zero 1"),
        (["--zero", "3", "--no-checkpointing", "--micro-batch", "8"], "Leave out --no-checkpointing"),
        (["--zero", "3", "--micro-batch", "24"], "--micro-batch 12"),
    ],
)
def test_what_cannot_fit_is_refused_in_one_line(
    options: list[str], knob: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["--preset", "small", "--gpus", "8", "--gpu-memory", "24", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert knob in error
    assert "--gpu-memory 24" in error


@pytest.mark.slow
def test_one_layer_of_7b_runs_forward_and_backward_at_its_true_width() -> None:
    torch.manual_seed(0)
    layer = build_backbone(replace(preset("7b").backbone, num_layers=1, vocab_size=8))
    layer.model(inputs_embeds=torch.randn(1, 16, 3584), use_cache=False).last_hidden_state.square().mean().backward()
    experts = layer.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (8, 2 * 2560, 3584)
    assert all(torch.isfinite(p.grad).all() for p in layer.model.layers[0].parameters())
    assert experts.gate_up_proj.grad.any()
