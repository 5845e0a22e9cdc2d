"""The configuration: one pydantic model per TOML section. Loading lives in ``config_load.py``."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distcl import registry
from distcl.errors import ConfigError

TrackerKind = Literal["jsonl", "wandb", "mlflow", "none"]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _known(kind: str, name: str) -> str:
    try:
        return registry.check(kind, name)
    except ConfigError as error:
        raise ValueError(str(error)) from error


class RunConfig(Section):
    """The run as a whole."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random number of the run")
    out: str = Field("", description="run folder; empty: runs/<name of the config file>")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="arithmetic of the model; fp64 under ddp only, for exactness"
    )
    poll_steps: int = Field(
        20, ge=1, description="steps between two points at which the loop looks at losses"
    )
    report: bool = Field(True, description="write report.html into the run folder at the end")
    max_minutes: float = Field(
        0.0, ge=0, description="save and stop with exit code 75 after this long; 0: never"
    )
    timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="a collective that takes longer ends the run on all ranks; after half of it "
        "the log names the rank that hangs, and where",
    )


class StreamConfig(Section):
    """Where samples come from, and how they drift."""

    source: str = Field(
        "digits", description="digits, arrays, mnist, cifar10, cifar100, hf, shards, or your own"
    )
    path: str = Field(
        "",
        description="arrays, mnist: an .npz; mnist, cifar10, cifar100: the folder of the files; "
        "hf: a folder, or a name on the hub; shards: their folder",
    )
    x: str = Field("", description="arrays: an .npy of inputs (with y), instead of path")
    y: str = Field("", description="arrays: an .npy of integer labels, or of float targets")
    x_test: str = Field("", description="arrays: an .npy of held-out inputs")
    y_test: str = Field("", description="arrays: an .npy of held-out labels or targets")
    options: dict[str, Any] = Field({}, description="keyword arguments of the source's factory")
    sha256: dict[str, str] = Field(
        {}, description="SHA-256 that files must have, by name, relative to path; hexadecimal"
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share held out per class where there is no test split"
    )
    drift: str | list[str] = Field("rotate", description="drift schedule, or several, in order")
    drift_options: dict[str, dict[str, Any]] = Field(
        {}, description="keyword arguments of a drift schedule, by its name"
    )
    experiences: int = Field(5, ge=1, description="number of experiences in the stream")
    recurring: int = Field(
        0, ge=0, description="K: experience e has concept e mod K, so concepts come again; 0: never"
    )
    samples_per_experience: int = Field(
        0, ge=0, description="training samples of an experience; 0: all that the source has"
    )
    severity: float = Field(
        1.0, ge=0, description="strength of the drift, relative to the schedule's own default"
    )
    transition: Literal["abrupt", "gradual"] = Field(
        "abrupt", description="gradual: early samples still come from the concept before"
    )
    transition_fraction: float = Field(
        0.25, gt=0, le=1, description="share of an experience over which a gradual drift spreads"
    )

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        return _known("source", value)

    @field_validator("drift")
    @classmethod
    def _drift(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            _known("drift", name)
        return value

    @field_validator("sha256")
    @classmethod
    def _sha256(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not re.fullmatch("[0-9a-fA-F]{64}", digest):
                raise ValueError(f"'{digest}' of '{name}' is not 64 hexadecimal digits")
        return value

    @model_validator(mode="after")
    def _drift_options(self) -> StreamConfig:
        for name in self.drift_options:
            if name not in self.drifts:
                raise ValueError(
                    f"stream.drift_options.{name}: '{name}' is not in stream.drift = {self.drift!r}"
                )
        return self

    @property
    def drifts(self) -> list[str]:
        """The drift schedules as a list, in the order they are applied."""
        return [self.drift] if isinstance(self.drift, str) else list(self.drift)


class ModelConfig(Section):
    """The model."""

    name: str = Field(
        "mlp", description="mlp, cnn, resnet18, vit_tiny, timm:NAME, or package.module:factory"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the model's factory")
    loss: str = Field(
        "cross_entropy", description="cross_entropy, mse, bce, or package.module:attribute"
    )
    pretrained: str = Field("", description="a .safetensors file to start from")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _known("model", value)

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        return _known("loss", value)


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="torch's optimizer")
    lr: float = Field(0.05, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum (sgd)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    between_rounds: Literal["keep", "reset"] = Field(
        "keep", description="whether the optimizer's state survives from round to round"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up at the start of every round"
    )
    decay: Literal["none", "linear", "cosine"] = Field(
        "none", description="how the learning rate falls towards 0 within every round"
    )


class TrainingConfig(Section):
    """How long a round trains."""

    batch_size: int = Field(64, ge=1, description="global batch size, over all ranks together")
    epochs: int = Field(
        5,
        ge=1,
        description="passes of a round, where steps_per_round is 0; 1: online, each sample once",
    )
    steps_per_round: int = Field(0, ge=0, description="steps of a round; 0: epochs decide")
    step_factor: float = Field(
        1.0,
        gt=0,
        description="multiplies the steps of every round, but not pretraining; distcl compare sets "
        "it where variants are to cost the same",
    )
    pretrain_epochs: int = Field(
        5, ge=0, description="passes over the first experience, if no pretrained weights are given"
    )
    accept: Literal["always", "improves"] = Field(
        "always",
        description="improves: a round that makes held-out data of old and new experiences worse "
        "is taken back",
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        "stop",
        description="rollback: go back to the last checkpoint with half the learning rate",
    )
    max_rollbacks: int = Field(2, ge=1, description="rollbacks of a run, at most")
    eval_batch_size: int = Field(256, ge=1, description="chunk of an evaluation pass, per rank")
    accumulate: int = Field(
        1, ge=1, description="parts of a global batch, one after another; draws stay the same"
    )
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of the gradient, regularizers included; 0: any"
    )


class ContinualLearningConfig(Section):
    """The updater, and what is replayed."""

    update_mode: str = Field("base", description="the updater, or package.module:attribute")
    importance_weighting: bool = Field(False, description="draw samples by priority")
    importance_alpha: float = Field(
        1.0, ge=0, description="exponent of the priorities; 0: uniform draws with replacement"
    )
    current_ratio: float = Field(
        1.0,
        gt=0,
        le=1,
        description="r: a pass draws r·N current and (1-r)·N history samples; 1.0: both in full",
    )
    mix_historic_data: bool = Field(
        False, description="train on earlier experiences along with the current one"
    )
    buffer_size: int = Field(
        0, ge=0, description="most samples that the history keeps, a fair sample; 0: all"
    )
    history_store: Literal["ids", "copy"] = Field(
        "ids",
        description="ids: samples of the history are read again; copy: kept in memory, for sources "
        "that do not stay",
    )
    replay_batch_size: int = Field(
        0,
        ge=0,
        description="global batch of history for updaters that take one; 0: training.batch_size",
    )
    der_alpha: float = Field(0.5, ge=0, description="weight of the stored logits (der)")
    der_beta: float = Field(0.5, ge=0, description="weight of the history batch's loss (der)")
    lwf_alpha: float = Field(1.0, ge=0, description="weight of the distillation (lwf)")
    lwf_temperature: float = Field(2.0, gt=0, description="temperature of both softmaxes (lwf)")
    si_c: float = Field(0.1, ge=0, description="strength of the penalty (si)")
    si_xi: float = Field(0.1, gt=0, description="keeps the importance finite, in weights² (si)")
    si_step: Literal["damped", "explicit"] = Field(
        "damped", description="damped: stable at any si_c; explicit: as published"
    )
    ewc_lambda: float = Field(100.0, ge=0, description="strength of the EWC penalty")
    ewc_ema_decay: float = Field(
        0.9, ge=0, lt=1, description="share of the old Fisher that a commit keeps"
    )
    ewc_step: Literal["damped", "explicit"] = Field(
        "damped", description="damped: stable at any lambda; explicit: as published"
    )
    fisher_samples: int = Field(
        1024, ge=1, description="training samples of one Fisher pass, at most"
    )
    kfac_lambda: float = Field(100.0, ge=0, description="strength of the K-FAC penalty")
    kfac_ema_decay: float = Field(
        0.9, ge=0, lt=1, description="share of the old Kronecker factors that a commit keeps"
    )
    kfac_every: int = Field(
        20, ge=1, description="steps from one that counts for the Kronecker factors to the next"
    )
    kfac_step: Literal["damped", "explicit"] = Field(
        "damped", description="damped: stable at any lambda; explicit: as published"
    )
    jvp_rho_theta: float = Field(
        0.05, ge=0, description="jvp_reg: distance that the weights are moved uphill (L2)"
    )
    jvp_rho_x: float = Field(
        0.05, ge=0, description="jvp_reg: distance that each sample's input is moved uphill"
    )
    jvp_data_sign: bool = Field(
        False, description="jvp_reg: move inputs by the gradient's sign, not its L2 direction"
    )
    jvp_lambda: float = Field(
        0.1, ge=0, description="jvp_penalty: strength of the penalty on squared slopes"
    )
    jvp_deltax_norm: float = Field(
        1.0, gt=0, description="jvp_penalty: length of the step towards a history sample (L2)"
    )

    @field_validator("update_mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        return _known("updater", value)


class PriorityConfig(Section):
    """What is scored, and how weights become draws; in force if importance_weighting is true."""

    signal: str = Field("loss_delta", description="what is scored, or package.module:attribute")
    options: dict[str, Any] = Field({}, description="keyword arguments of the signal")
    source: Literal["score", "candidates", "online"] = Field(
        "score",
        description="score: one pass at the start of a round; candidates: each step scores more "
        "than it needs and keeps some; online: from training itself, no extra forward",
    )
    candidates: int = Field(
        2, ge=1, description="source candidates: how many are scored for one that is kept"
    )
    refresh_steps: int = Field(
        10, ge=1, description="source online: steps from one update of the weights to the next"
    )
    pool: int = Field(
        0,
        ge=0,
        description="source online: an update weighs a fresh uniform sample of this many of the "
        "history; 0: all of it",
    )
    max_replay: float = Field(
        0.0,
        ge=0,
        description="history is drawn uniformly in a round that replays each stored sample more "
        "often than this; 0: never",
    )
    target: Literal["auto", "current", "history", "union"] = Field(
        "auto", description="auto: current data; history too if the updater takes a history batch"
    )
    draw: Literal["multinomial", "systematic", "without_replacement"] = Field(
        "multinomial", description="how weights become draws (source score and online)"
    )
    floor: float = Field(0.0, ge=0, le=1, description="share of uniform draws mixed in")
    cap: float = Field(0.0, ge=0, description="largest weight, in means, at least 1; 0: none")
    min_ess: float = Field(
        0.0, ge=0, le=1, description="smallest effective sample size, as a share of N; 0: none"
    )
    min_score: float = Field(1e-8, gt=0, description="smaller scores count as this")
    correction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="importance-sampling correction of the loss, as an exponent; 0: none",
    )
    guard: Literal["off", "auto"] = Field(
        "off",
        description="auto: a round whose weights are too uneven, or prefer experiences that "
        "held-out data say are learned already, is drawn uniformly",
    )
    score_batch: int = Field(512, ge=1, description="samples of one forward of the scoring pass")

    @field_validator("signal")
    @classmethod
    def _signal(cls, value: str) -> str:
        return _known("signal", value)

    @field_validator("cap")
    @classmethod
    def _cap(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("it is in means, so it is 0 (none) or at least 1")
        return value


class MonitorConfig(Section):
    """How ``distcl run`` watches the stream."""

    metric: str = Field(
        "error",
        description="what the detector is fed of each sample: loss, error, accuracy, entropy, "
        "input_distance, or package.module:attribute",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the metric")
    label_delay: int = Field(
        0,
        ge=-1,
        description="samples that come between a sample and its label; -1: labels never come",
    )
    batch_size: int = Field(64, ge=1, description="samples looked at in one step, over all ranks")
    window: int = Field(
        1000,
        ge=2,
        description="a round learns from at most this many of the newest labelled samples",
    )
    collect: int = Field(
        0, ge=0, description="labelled samples to gather after a drift before its round begins"
    )
    holdout_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of a round's samples kept for evaluation"
    )
    pretrain_fraction: float = Field(
        0.5, gt=0, lt=1, description="share of the first experience that pretraining takes"
    )
    warmup: int = Field(0, ge=0, description="samples before the detector may fire")
    cooldown: int = Field(
        0, ge=0, description="samples after a round in which the detector does not fire"
    )
    reset_detector: bool = Field(True, description="whether a round resets the detector")
    max_rounds: int = Field(0, ge=0, description="stop after this many rounds; 0: never")

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        return _known("metric", value)


class DetectorConfig(Section):
    """The drift detector."""

    name: str = Field("adwin", description="the detector, or package.module:attribute")
    options: dict[str, Any] = Field({}, description="keyword arguments of the detector")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _known("detector", value)


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
    deepspeed_config: str = Field(
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
    transforms: list[str | dict[str, Any]] = Field(
        [],
        description="shards: crop, flip, normalize or package.module:function, in order; a table "
        "{ name = …, … } gives options",
    )


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
        2, ge=1, description="newest checkpoints that stay, besides the most accurate one"
    )


class TrackingConfig(Section):
    """Where metrics go. ``OUT/metrics.jsonl`` is written unless kind is none."""

    kind: TrackerKind | list[TrackerKind] = Field(
        "jsonl", description="jsonl, wandb, mlflow or none; or a list of them"
    )
    project: str = Field("distcl", min_length=1, description="project, or experiment, of the run")
    name: str = Field("", description="name of the run; empty: that of the run folder")
    entity: str = Field("", description="wandb: user or team; empty: the user's own")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto", description="wandb; auto: online if there is a key, else offline"
    )

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: TrackerKind | list[TrackerKind]) -> TrackerKind | list[TrackerKind]:
        if isinstance(value, list) and ("none" in value or not value or _repeats(value)):
            raise ValueError("a list holds one or more of jsonl, wandb, mlflow, each once")
        return value

    @property
    def kinds(self) -> list[TrackerKind]:
        """The kinds as a list."""
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)


def _repeats(values: list[TrackerKind]) -> bool:
    return len(set(values)) < len(values)


class Config(Section):
    """A whole configuration file."""

    run: RunConfig = RunConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    continual_learning: ContinualLearningConfig = ContinualLearningConfig()
    priority: PriorityConfig = PriorityConfig()
    monitor: MonitorConfig = MonitorConfig()
    detector: DetectorConfig = DetectorConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.run.precision == "fp64" and self.parallel.strategy != "ddp":
            raise ValueError("run.precision = 'fp64' works with parallel.strategy = 'ddp' only")
        return self
