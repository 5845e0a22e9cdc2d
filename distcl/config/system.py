"""The sections of what is around learning: processes, data access, checkpoints, tracking."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distcl.config.base import Section, known
from distcl.config.paths import PathText

TrackerKind = Literal[
    "jsonl", "wandb", "mlflow", "tensorboard", "comet_ml", "aim", "clearml", "dvclive", "none"
]


class ParallelConfig(Section):
    """How the work is spread over processes."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp", description="layout of weights, gradients and optimizer state; see PARALLEL.md"
    )
    processes: int = Field(
        0, ge=0, description="processes that there must be; 0: as many as were started"
    )
    anchor_device: Literal["device", "cpu"] = Field(
        "device", description="where theta_star is kept: beside the weights, or in host memory"
    )
    offload_optimizer: bool = Field(
        False,
        description="keep optimizer state and master weights (fsdp2: all shards) in host memory",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the model's blocks in backward instead of keeping activations"
    )
    find_unused_parameters: bool | Literal["auto"] = Field(
        "auto",
        description="ddp: look at each step for parameters that it gives no gradient; auto: for "
        "models with modules of your own, which may branch, or if the dry run has seen one",
    )
    deepspeed_config: PathText = Field(
        "", description="zero1, zero2, zero3: a DeepSpeed JSON of your own"
    )
    fsdp_unit: int = Field(
        1_000_000, ge=1, description="fsdp2: parameters that are gathered together, at least"
    )

    @model_validator(mode="after")
    def _belongs(self) -> ParallelConfig:
        if self.offload_optimizer and self.strategy == "ddp":
            raise ValueError("offload_optimizer needs strategy zero1, zero2, zero3 or fsdp2")
        if self.deepspeed_config and not self.strategy.startswith("zero"):
            raise ValueError("deepspeed_config needs strategy zero1, zero2 or zero3")
        return self


class DataConfig(Section):
    """How samples are read."""

    workers: int = Field(0, ge=0, description="reading processes per rank; 0: in the main process")
    pin_memory: bool = Field(False, description="copy batches through pinned memory (CUDA)")
    access: Literal["auto", "indexed", "stream"] = Field(
        "auto", description="shards: random reads by index, or from front to back; auto chooses"
    )
    verify: bool = Field(
        False, description="shards: check every sample's bytes against its checksum when read"
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error", description="shards: end the run at a bad sample, or leave it out and count it"
    )
    lanes: int = Field(
        8, ge=1, description="streamed shards: sequences read side by side, shared out over ranks"
    )
    shuffle_buffer: int = Field(
        1024, ge=1, description="streamed shards: samples of a lane that are shuffled together"
    )
    cache: PathText = Field(
        "",
        description="text, jsonl, hf_text: a folder that keeps their token ids, which all ranks "
        "map; made once for each state of files, tokenizer and options; empty: none",
    )
    transforms: list[str | dict[str, Any]] = Field(
        [],
        description="of samples of any source: resize, to_rgb, crop, flip, normalize or "
        "package.module:function, in order; a table { name = …, … } gives options",
    )

    @field_validator("transforms")
    @classmethod
    def _transforms(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for spec in value:
            name = spec if isinstance(spec, str) else spec.get("name")
            if not isinstance(name, str):
                raise ValueError(f"{spec} has no name")
            known("transform", name)
        return value


class CheckpointConfig(Section):
    """What is kept on disk."""

    save_final: bool = Field(
        True, description="write checkpoints/final.safetensors when the run is done"
    )
    every_round: bool = Field(True, description="save the whole state at the end of every round")
    every_minutes: float = Field(
        10.0, ge=0, description="save the whole state within a round this often; 0: never"
    )
    every_steps: int = Field(
        0, ge=0, description="save the whole state within a round this often; 0: never"
    )
    keep: int = Field(
        2, ge=1, description="newest checkpoints that stay, besides the one of the best score"
    )


class TrackingConfig(Section):
    """Where metrics go. ``OUT/metrics.jsonl`` is written unless kind is none."""

    kind: TrackerKind | list[TrackerKind] = Field(
        "jsonl", description="jsonl, a service, or none; or a list of them"
    )
    project: str = Field("distcl", min_length=1, description="project, or experiment, of the run")
    name: str = Field("", description="name of the run; empty: that of the run folder")

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: TrackerKind | list[TrackerKind]) -> TrackerKind | list[TrackerKind]:
        if isinstance(value, list) and ("none" in value or not value or _repeats(value)):
            raise ValueError("a list holds jsonl and services, one or more, each once")
        return value

    @property
    def kinds(self) -> list[TrackerKind]:
        """The kinds as a list."""
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)


def _repeats(values: list[TrackerKind]) -> bool:
    return len(set(values)) < len(values)
