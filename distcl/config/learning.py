"""The sections of the run, of what learns, and of plain training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distcl.config.base import Section, Table, known
from distcl.config.paths import PathText


class RunConfig(Section):
    """The run as a whole."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random number of the run")
    out: PathText = Field(
        "", description="run folder; empty: runs/<name of the config file>, then -2, …"
    )
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


class LoraOptions(Table):
    """What ``model.lora`` holds."""

    r: int = Field(ge=1, description="the rank of the adapters")
    alpha: float = Field(16.0, gt=0)
    targets: list[str] = Field([])
    dropout: float = Field(0.0, ge=0, lt=1)
    train: list[str] = Field([])


class ModelConfig(Section):
    """The model."""

    name: str = Field(
        "mlp",
        description="mlp, cnn, resnet18, vit_tiny, decoder, timm:NAME, hf:AutoModelForCausalLM and "
        "its like, or package.module:factory",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the model's factory")
    loss: str = Field(
        "cross_entropy", description="cross_entropy, mse, bce, or package.module:attribute"
    )
    score: str | list[str] = Field(
        "",
        description="what the accuracy matrix holds: accuracy, r2, loss, perplexity, "
        "bits_per_byte, token_accuracy, top_k, f1_macro, auroc, or package.module:function; of "
        "several the first leads; empty: accuracy, or r2 in regression",
    )
    score_options: dict[str, dict[str, Any]] = Field(
        {}, description="keyword arguments of a score, by its name: `top_k = { k = 3 }`"
    )
    pretrained: PathText = Field("", description="a .safetensors file to start from")
    pretrained_skip: list[str] = Field(
        [], description="names in it, or of the model, to leave as they are: `head.*`"
    )
    lora: dict[str, Any] = Field(
        {},
        description="train low-rank adapters in place of the weights, through peft: "
        "`{ r = 8, alpha = 16, targets = ['c_attn'], dropout = 0.0, train = ['classifier'] }`; r "
        "must be given, without targets it is every linear layer but the head, and train names "
        "modules that train whole; empty: no adapters",
    )
    freeze: list[str] = Field(
        [],
        description="names of parameters that do not train: `encoder.*`; norms whose running "
        "statistics match compute with those, and leave them as they are",
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return known("model", value)

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        return known("loss", value)

    @field_validator("score")
    @classmethod
    def _score(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) and value else value:
            known("score", name)
        return value

    @field_validator("lora")
    @classmethod
    def _lora(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value:
            LoraOptions.of(value)
        return value

    @model_validator(mode="after")
    def _skip(self) -> ModelConfig:
        if self.pretrained_skip and not self.pretrained:
            raise ValueError("model.pretrained_skip needs model.pretrained")
        for name in self.score_options:
            if name not in self.scores:
                raise ValueError(
                    f"model.score_options.{name}: '{name}' is not in model.score = {self.score!r}"
                )
        return self

    @property
    def scores(self) -> list[str]:
        """The scores as a list, the leading one first; [] for what loss and targets suggest."""
        return [self.score] * bool(self.score) if isinstance(self.score, str) else list(self.score)


class ParameterGroup(Table):
    """What one of ``optimizer.groups`` holds; None: as the optimizer has it."""

    pattern: str = Field(min_length=1, description="which parameters are in it, by name")
    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimizerConfig(Section):
    """The optimizer."""

    name: str = Field(
        "sgd",
        description="sgd, adam, adamw, or package.module:function of the parameters, which sets "
        "its own rates",
    )
    lr: float = Field(0.05, gt=0, description="learning rate")
    min_lr: float = Field(
        0.0,
        ge=0,
        description="what the learning rate falls to by decay; those of groups by the same share",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum (sgd)")
    nesterov: bool = Field(False, description="Nesterov's momentum (sgd)")
    betas: list[float] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="decay of the first and second moment (adam, adamw)",
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    groups: list[dict[str, Any]] = Field(
        [],
        description="parameters with another rate or decay: `[[optimizer.groups]]` with pattern, "
        "as `head.*`, and lr or weight_decay; of several that match the first counts",
    )
    fused: bool = Field(
        False,
        description="torch's fused kernel, which takes one pass over the weights a step: faster, "
        "most of all for adam; it rounds otherwise",
    )
    between_rounds: Literal["keep", "reset"] = Field(
        "keep", description="whether the optimizer's state survives from round to round"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up at the start of every round"
    )
    decay: Literal["none", "linear", "cosine"] = Field(
        "none", description="how the learning rate falls towards min_lr within every round"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return known("optimizer", value)

    @property
    def own(self) -> bool:
        """Whether it is the user's, to which rates and moments are no concern of this section."""
        return self.name not in ("sgd", "adam", "adamw")

    @field_validator("groups")
    @classmethod
    def _groups(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for table in value:
            group = ParameterGroup.of(table)
            if group.lr is None and group.weight_decay is None:
                raise ValueError(f"'{group.pattern}' has neither lr nor weight_decay")
        return value

    @model_validator(mode="after")
    def _used(self) -> OptimizerConfig:
        for key in ("lr", "min_lr", "momentum", "nesterov", "betas", "weight_decay", "groups"):
            value = getattr(self, key)
            if self.own and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"optimizer.{key} = {value} is for sgd, adam and adamw; '{self.name}' sets its "
                    "own"
                )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"optimizer.betas: {beta} is not from 0 to below 1")
        if self.name == "sgd" and self.betas != [0.9, 0.999]:
            raise ValueError(f"optimizer.betas = {self.betas} are for adam and adamw, not for sgd")
        if self.name != "sgd" and (self.momentum or self.nesterov):
            key = "momentum" if self.momentum else "nesterov"
            raise ValueError(
                f"optimizer.{key} = {getattr(self, key)} is for sgd; {self.name} has its own"
            )
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov = true needs optimizer.momentum above 0")
        if self.min_lr and self.decay == "none":
            raise ValueError(
                f"optimizer.min_lr = {self.min_lr} is where optimizer.decay ends, which is 'none'"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr = {self.min_lr} is above lr = {self.lr}")
        return self


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
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the weights after a round are a moving average over its steps, with this "
        "decay; the next round trains on from the last ones. 0: they are the last ones",
    )
    swa: bool = Field(
        False, description="the weights after a round are the plain mean over its steps"
    )
    accept: Literal["always", "improves"] = Field(
        "always",
        description="improves: a round that makes held-out data of old and new experiences worse "
        "is taken back",
    )
    max_rollbacks: int = Field(
        0,
        ge=0,
        description="how often a run that diverges goes back to the last checkpoint, with half the "
        "learning rate; 0: it stops",
    )
    eval_batch_size: int = Field(256, ge=1, description="chunk of an evaluation pass, per rank")
    accumulate: int = Field(
        1, ge=1, description="parts of a global batch, one after another; draws stay the same"
    )
    normalize: Literal["sample", "token"] = Field(
        "sample",
        description="what the loss of a global batch is a mean of: its samples, or the targets of "
        "all of them that count, where each has several, as texts have",
    )
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of the gradient, regularizers included; 0: any"
    )

    @model_validator(mode="after")
    def _one_mean(self) -> TrainingConfig:
        if self.ema and self.swa:
            raise ValueError(f"ema = {self.ema:g} and swa = true are two means; choose one")
        return self
