"""The sections of continual learning: methods, priorities, the monitor and its detector."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from distcl.config.base import Section, known


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
        description="r: a pass draws r·N current and (1-r)·N history samples, rounded down (0.57 "
        "of 100 is 57), of current ones at least 1; 1.0: both in full",
    )
    mix_historic_data: bool = Field(
        False, description="train on earlier experiences along with the current one"
    )
    buffer_size: int = Field(
        0, ge=0, description="most samples that the history keeps, a fair sample; 0: all"
    )
    history_of: Literal["all", "general"] = Field(
        "all",
        description="what is replayed: earlier experiences, and stream.general if there is one; or "
        "that alone",
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
    penalty_step: Literal["damped", "explicit"] = Field(
        "damped",
        description="ewc_online, kfac_online, si: damped: stable at any strength; explicit: as "
        "published",
    )
    mer_every: int = Field(
        10, ge=1, description="steps from one interpolation of the weights to the next (mer)"
    )
    mer_rate: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of an interval's way that the weights keep (mer); 1: as er",
    )
    der_alpha: float = Field(0.5, ge=0, description="weight of the stored logits (der)")
    der_beta: float = Field(0.5, ge=0, description="weight of the history batch's loss (der)")
    lwf_alpha: float = Field(1.0, ge=0, description="weight of the distillation (lwf)")
    lwf_temperature: float = Field(2.0, gt=0, description="temperature of both softmaxes (lwf)")
    lwf_top_k: int = Field(
        0,
        ge=0,
        description="classes that the teacher keeps of each position, with the mass of the others "
        "(lwf); 0: all",
    )
    si_c: float = Field(0.1, ge=0, description="strength of the penalty (si)")
    si_xi: float = Field(0.1, gt=0, description="keeps the importance finite, in weights² (si)")
    ewc_lambda: float = Field(100.0, ge=0, description="strength of the EWC penalty")
    ewc_ema_decay: float = Field(
        0.9, ge=0, lt=1, description="share d of the old Fisher that a commit keeps"
    )
    ewc_fisher: Literal["mean", "sum"] = Field(
        "mean",
        description="mean: old and new Fisher weigh d and 1 - d; sum: d and 1, so rounds add up",
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
    jvp_rho_theta: float = Field(
        0.05, ge=0, description="jvp_reg: distance that the weights are moved uphill (L2)"
    )
    jvp_rho_x: float = Field(
        0.05, ge=0, description="jvp_reg: distance that each sample's input is moved uphill"
    )
    jvp_data_sign: bool = Field(
        False, description="jvp_reg: move inputs by the gradient's sign, not its L2 direction"
    )

    @field_validator("update_mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        return known("updater", value)


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
    draw: Literal["multinomial", "systematic", "without_replacement", "credit"] = Field(
        "multinomial", description="how weights become draws (source score and online)"
    )
    floor: float = Field(0.0, ge=0, le=1, description="share of uniform draws mixed in")
    gate: float = Field(
        0.0,
        ge=0,
        description="signal entropy: draws are uniform where its mean is this share of the largest "
        "there can be, ln C, or more; the smaller it is, the more they are by priority. 0: no gate",
    )
    cap: float = Field(0.0, ge=0, description="largest weight, in means, at least 1; 0: none")
    min_ess: float = Field(
        0.0, ge=0, le=1, description="smallest effective sample size, as a share of N; 0: none"
    )
    min_score: float = Field(1e-8, gt=0, description="smaller scores count as this one")
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
        return known("signal", value)

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
    max_rounds: int = Field(0, ge=0, description="stop after this many rounds; 0: never")

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        return known("metric", value)


class DetectorConfig(Section):
    """The drift detector."""

    name: str = Field("adwin", description="the detector, or package.module:attribute")
    options: dict[str, Any] = Field({}, description="keyword arguments of the detector")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return known("detector", value)
