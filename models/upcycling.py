"""A dense Qwen2 or Qwen2.5 checkpoint made into a mixture of experts that computes the same function.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055), from a local folder of safetensors to one that
`Qwen2MoeForCausalLM.from_pretrained`, vLLM and training read. Two modes:

- `shared`: the dense feed-forward network becomes the shared expert. Its gate is zero, so half of it is let through,
  and its last matrix is doubled. The routed experts hold slices of the dense one and add nothing until they have
  learned to, for their last matrix is zero. Exact for any number and width of experts.
- `copies`: every expert is the whole dense network, the shared expert adds nothing yet. The weights of the chosen
  experts sum to one, so their sum is the dense output.

Tensor by tensor: at no time is more in memory than one shard of the result and one tensor of the source.
"""

# H backbone width, I dense width, W width of a routed expert, E experts, V rows of the vocabulary

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2MoeConfig

from omnimri.models.backbone import moe_config
from omnimri.models.config import PRESETS, BackboneConfig
from omnimri.models.tokenizer import adopt_tokenizer, has_tokenizer, read_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ROUTER_STD = 0.02
"""Of the routers' first weights, as `Qwen2MoeConfig.initializer_range`."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How the experts are made."""

    num_experts: int = 8
    experts_per_token: int = 2
    expert_width: int | None = None
    """Of a routed expert in mode `shared`; None takes that of the preset with the source's shape, or a quarter of the
    dense width. In mode `copies` it is the dense width."""
    mode: Literal["shared", "copies"] = "shared"
    noise: float = 0.0
    """Standard deviation of the noise on the routed experts' first matrices, relative to that of the matrix. In mode
    `shared` the function stays exactly the same, in mode `copies` it does not."""
    new_rows: Literal["keep", "draw"] = "keep"
    """Rows of our special tokens: as the source has them (every logit stays the same), or drawn with the mean and
    spread of the rows of words (every logit of the source's own tokens stays the same)."""
    seed: int = 0
    """Of the routers, the slices and the noise."""
    max_shard_mb: int = 2048
    """Largest file of the result, and so what is held in memory."""

    def __post_init__(self) -> None:
        if self.mode not in ("shared", "copies"):
            raise ValueError(f"UpcycleConfig.mode: shared or copies, found {self.mode!r}.")
        if self.new_rows not in ("keep", "draw"):
            raise ValueError(f"UpcycleConfig.new_rows: keep or draw, found {self.new_rows!r}.")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"UpcycleConfig.experts_per_token must lie between 1 and num_experts ({self.num_experts}), found "
                f"{self.experts_per_token}."
            )
        if self.noise < 0:
            raise ValueError(f"UpcycleConfig.noise must be 0 or more, found {self.noise}.")


def upcycle(source: Path | str, out: Path | str, config: UpcycleConfig | None = None) -> BackboneConfig:
    """Write the mixture of experts to the folder `out`, at once or not at all; returns its shape.

    The source's tokenizer goes with it, our special tokens in rows that nothing uses.

    Raises:
        ValueError: If the source is no dense Qwen2 checkpoint in safetensors, or `out` exists.
    """
    source, out, config = Path(source), Path(out), config or UpcycleConfig()
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it.")
    dense = read_dense_config(source)
    shape = upcycled_shape(dense, config)
    tokenizer = adopt_tokenizer(source, shape.vocab_size) if has_tokenizer(source) else None
    rows = None if tokenizer is None else (1 + max(read_tokenizer(source).get_vocab().values()), len(tokenizer))
    partial = out.with_name(f".{out.name}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        writer = _ShardWriter(partial, config.max_shard_mb * 2**20)
        for name, tensor in _tensors(source):
            if name in _VOCABULARY and rows is not None and config.new_rows == "draw":
                tensor = _draw_rows(tensor, rows, config.seed)
            for new_name, value in upcycled_tensors(name, tensor, dense, shape, config):
                writer.add(new_name, value)
        writer.close()
        _save_config(dense, shape, partial)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", partial / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return shape


_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def _save_config(dense: Qwen2Config, shape: BackboneConfig, folder: Path) -> None:
    """`config.json` with the source's number type and the tokens at which its sequences begin and end."""
    config = moe_config(shape)
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.dtype = dense.dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(dense, name))
    config.save_pretrained(folder)


def read_dense_config(folder: Path) -> Qwen2Config:
    """The configuration of a dense Qwen2 or Qwen2.5 folder.

    Raises:
        ValueError: If it is another model, or one whose function Qwen2-MoE as we build it does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a Qwen2 or Qwen2.5 checkpoint, found no config.json.")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") != "qwen2":
        raise ValueError(
            f"{folder}: expected a dense Qwen2 or Qwen2.5 (model_type 'qwen2'), found {values.get('model_type')!r}; "
            "no other model has the attention of Qwen2-MoE."
        )
    config = Qwen2Config.from_pretrained(folder, local_files_only=True)
    refused = {
        "use_sliding_window": bool(values.get("use_sliding_window")),
        "quantization_config": "quantization_config" in values,
        "rope_scaling": (config.rope_parameters or {}).get("rope_type", "default") != "default",
        "hidden_act": config.hidden_act != "silu",
        "head_dim": values.get("head_dim", config.hidden_size // config.num_attention_heads)
        != config.hidden_size // config.num_attention_heads,
    }
    if found := [name for name, differs in refused.items() if differs]:
        raise ValueError(
            f"{folder}/config.json: {', '.join(found)} set to what Qwen2-MoE is not served with; take the plain "
            "checkpoint of that size."
        )
    return config


def upcycled_shape(dense: Qwen2Config, config: UpcycleConfig) -> BackboneConfig:
    """Shape of the result.

    Raises:
        ValueError: If routed experts are to be wider than what they are cut from.
    """
    width = _expert_width(dense, config)
    if width > dense.intermediate_size:
        raise ValueError(
            f"UpcycleConfig.expert_width ({width}) exceeds the dense width {dense.intermediate_size} of the source."
        )
    return BackboneConfig(
        hidden_size=dense.hidden_size,
        num_layers=dense.num_hidden_layers,
        num_heads=dense.num_attention_heads,
        num_kv_heads=dense.num_key_value_heads,
        shared_width=dense.intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        expert_width=width,
        vocab_size=dense.vocab_size,
        max_positions=dense.max_position_embeddings,
        tie_embeddings=dense.tie_word_embeddings,
        rope_theta=dense.rope_parameters["rope_theta"],
        norm_eps=dense.rms_norm_eps,
    )


def _expert_width(dense: Qwen2Config, config: UpcycleConfig) -> int:
    if config.mode == "copies":
        if config.expert_width not in (None, dense.intermediate_size):
            raise ValueError(
                f"UpcycleConfig.expert_width ({config.expert_width}) must be the dense width "
                f"{dense.intermediate_size} in mode 'copies'; leave it out, or use mode 'shared'."
            )
        return dense.intermediate_size
    if config.expert_width is not None:
        return config.expert_width
    wanted = (dense.hidden_size, dense.num_hidden_layers, dense.intermediate_size)
    for build in PRESETS.values():
        backbone = build().backbone
        if (backbone.hidden_size, backbone.num_layers, backbone.shared_width) == wanted:
            return backbone.expert_width
    return max(1, dense.intermediate_size // 4)


_FEED_FORWARD = re.compile(r"(model\.layers\.(\d+)\.mlp\.)(gate_proj|up_proj|down_proj)\.weight")


def upcycled_tensors(
    name: str, tensor: Tensor, dense: Qwen2Config, shape: BackboneConfig, config: UpcycleConfig
) -> Iterator[tuple[str, Tensor]]:
    """What one tensor of the dense model becomes.

    Args:
        name: In the source; what is no part of a feed-forward network keeps name and value.
        tensor: `(I, H)` of `gate_proj` and `up_proj`, `(H, I)` of `down_proj`.
        dense: Configuration of the source.
        shape: Of the result.
        config: How the experts are made.

    Yields:
        Names as `save_pretrained` writes them (one tensor per expert, as vLLM reads them), and values.
    """
    found = _FEED_FORWARD.fullmatch(name)
    if found is None:
        if not (name == "lm_head.weight" and dense.tie_word_embeddings):
            yield name, tensor
        return
    prefix, layer, matrix = found[1], int(found[2]), found[3]
    copies = config.mode == "copies"
    if matrix == "down_proj":
        yield f"{prefix}shared_expert.down_proj.weight", torch.zeros_like(tensor) if copies else 2 * tensor
        for expert in range(shape.num_experts):
            value = tensor if copies else tensor.new_zeros(shape.hidden_size, shape.expert_width)
            yield f"{prefix}experts.{expert}.down_proj.weight", value
        return
    yield f"{prefix}shared_expert.{matrix}.weight", tensor
    random = torch.Generator().manual_seed(config.seed * 1_000_003 + 2 * layer + (matrix == "up_proj"))
    slices = _slices(shape, torch.Generator().manual_seed(config.seed * 7_919 + layer))
    for expert in range(shape.num_experts):
        value = tensor if copies else tensor[slices[expert]]
        yield f"{prefix}experts.{expert}.{matrix}.weight", _jittered(value, config.noise, random)
    if matrix == "gate_proj":
        router = ROUTER_STD * torch.randn(shape.num_experts, shape.hidden_size, generator=random)
        yield f"{prefix}gate.weight", router.to(tensor.dtype)
        yield f"{prefix}shared_expert_gate.weight", tensor.new_zeros(1, shape.hidden_size)


def _slices(shape: BackboneConfig, random: torch.Generator) -> Tensor:
    """Dense channels of each expert, `(E, W)`: a random order dealt out in turn, begun again when it is used up."""
    order = torch.randperm(shape.shared_width, generator=random)
    dealt = torch.arange(shape.num_experts * shape.expert_width) % shape.shared_width
    return order[dealt].reshape(shape.num_experts, shape.expert_width)


def _jittered(value: Tensor, noise: float, random: torch.Generator) -> Tensor:
    if not noise:
        return value
    return value + (noise * value.float().std() * torch.randn(value.shape, generator=random)).to(value.dtype)


def _draw_rows(value: Tensor, rows: tuple[int, int], seed: int) -> Tensor:
    """`(V, H)` with the rows of new tokens drawn with mean and spread of the rows before them."""
    first, end = rows
    words = value[:first].float()
    random = torch.Generator().manual_seed(seed)
    drawn = words.mean(0) + words.std(0) * torch.randn(end - first, value.shape[1], generator=random)
    return torch.cat([value[:first], drawn.to(value.dtype), value[end:]])


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors folder, one at a time.

    Raises:
        ValueError: If there is no such file.
    """
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [SINGLE]
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: expected weights in safetensors ({SINGLE} or {INDEX}), {file} is not there.")
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                yield name, tensors.get_tensor(name)


class _ShardWriter:
    """Tensors into files of bounded size, with the index that transformers and vLLM read."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep one more tensor, after writing those before it if it would not fit."""
        if self._held and self._held_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes

    def _flush(self) -> None:
        # One storage may stand behind several names (copies): each is written out.
        storages = [tensor.untyped_storage().data_ptr() for tensor in self._held.values()]
        shared = len(set(storages)) < len(storages)
        values = {name: tensor.clone() if shared else tensor for name, tensor in self._held.items()}
        save_file(values, self._folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Write what is held, name the files, and write the index if there are several."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for number, name in enumerate(names):
            (self._folder / f"shard-{number}").rename(self._folder / name)
        if count > 1:
            places = {tensor: file for file, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(places.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_shape(folder: Path | str) -> BackboneConfig:
    """Shape of the backbone in a `Qwen2MoeForCausalLM` folder, as `upcycle` writes it.

    Raises:
        ValueError: If it holds another model, or none.
    """
    path = Path(folder) / "config.json"
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
    if model_type != "qwen2_moe":
        hint = " Make a mixture of experts of it first: omnimri upcycle." if model_type == "qwen2" else ""
        raise ValueError(f"{folder}: expected a backbone (model_type 'qwen2_moe'), found {model_type!r}.{hint}")
    config = Qwen2MoeConfig.from_pretrained(folder, local_files_only=True)
    return BackboneConfig(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        shared_width=config.shared_expert_intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
    )


def shape_overrides(folder: Path | str, wanted: BackboneConfig) -> list[str]:
    """Settings that make `wanted` the shape of the backbone in `folder`, as `--set` takes them.

    How many positions a run allows is its own affair, and is not among them.
    """
    found = asdict(read_shape(folder))
    mine = asdict(wanted)
    return [f"model.backbone.{key}={found[key]}" for key in mine if found[key] != mine[key] and key != "max_positions"]


def check_shape(folder: Path | str, wanted: BackboneConfig) -> None:
    """Check that the backbone in `folder` has the shape of the model that is to take it.

    Raises:
        ValueError: With the settings that would make them agree.
    """
    if changes := shape_overrides(folder, wanted):
        settings = " ".join(f"--set {change}" for change in changes)
        raise ValueError(
            f"{folder}: this backbone has another shape than the model. Choose the --preset of its size, or add "
            f"{settings}"
        )


_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def load_backbone(backbone: nn.Module, folder: Path | str, shape: BackboneConfig) -> None:
    """Fill a `Qwen2MoeForCausalLM` of that shape with the weights of a folder, tensor by tensor.

    Raises:
        ValueError: If the folder has another shape, or not every weight.
    """
    check_shape(folder, shape)
    own = dict(backbone.named_parameters())
    missing = {place for name in own for place in _places(name, shape)}
    with torch.no_grad():
        for name, tensor in _tensors(Path(folder)):
            target = _target(own, name)
            if target is not None:
                target.copy_(tensor)
                missing.discard(name)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are not there, for example {min(missing)}.")


def _target(own: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Where a saved tensor goes: transformers keeps the experts of a layer as one, gate above up."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return own.get(name)
    experts, number, matrix = found[1], int(found[2]), found[3]
    if matrix == "down_proj":
        return own[f"{experts}.down_proj"][number]
    gate, up = own[f"{experts}.gate_up_proj"][number].chunk(2)
    return gate if matrix == "gate_proj" else up


def _places(name: str, shape: BackboneConfig) -> list[str]:
    """Saved names of one parameter."""
    experts, _, matrix = name.rpartition(".")
    if not experts.endswith(".experts"):
        return [name]
    matrices = ["gate_proj", "up_proj"] if matrix == "gate_up_proj" else [matrix]
    return [f"{experts}.{number}.{single}.weight" for number in range(shape.num_experts) for single in matrices]
