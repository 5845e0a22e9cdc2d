"""Every pluggable part by name: one line a part. Nothing here imports torch.

A name that holds a colon, ``package.module:attribute``, is a user's own part; so is one given to
:func:`register`, and an object that a run was given, ``<object> package.module:Class``, while
:func:`objects` lends it that name. Resolving imports only the module that the name points to.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import pkgutil
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import ConfigDict, Field, ValidationError, validate_call

from distcl.errors import ConfigError, line_of_theirs, user_packages

Factory = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RegisteredPart:
    """A registry entry: ``target`` is ``package.module:attribute`` or the factory itself."""

    kind: str
    name: str
    target: str | Factory
    description: str


_TABLE = (
    ("updater", "base", "updaters.base:Updater", "plain training"),
    ("updater", "none", "updaters.base:Frozen", "evaluates, never trains"),
    ("updater", "ewc_online", "updaters.ewc:EWCOnline", "online elastic weight consolidation"),
    ("updater", "kfac_online", "updaters.kfac:KFACOnline", "penalty by Kronecker factors by layer"),
    ("updater", "si", "updaters.si:SynapticIntelligence", "synaptic intelligence"),
    ("updater", "lwf", "updaters.lwf:LwF", "learning without forgetting: distillation"),
    ("updater", "er", "updaters.er:ExperienceReplay", "replay of a history batch"),
    ("updater", "mer", "updaters.mer:MetaExperienceReplay", "replay and Reptile's interpolation"),
    ("updater", "der", "updaters.der:DarkExperienceReplay", "DER++: replay of logits"),
    ("updater", "jvp_reg", "updaters.jvp_reg:JVPReg", "steps robust to weights and inputs"),
    ("updater", "agem", "updaters.agem:AGEM", "averaged gradient episodic memory (A-GEM)"),
    ("signal", "loss_delta", "priority.signals:LossDelta", "loss gained since theta_star"),
    ("signal", "loss", "priority.signals:Loss", "the loss"),
    ("signal", "entropy", "priority.signals:Entropy", "entropy of the outputs"),
    (
        "signal",
        "grad_norm",
        "priority.signals:GradNorm",
        "norm of the loss's gradient at the last layer's pre-activations",
    ),
    ("signal", "fisher", "priority.signals:Fisher", "trace of the outputs' Fisher"),
    (
        "signal",
        "disagreement",
        "priority.signals:Disagreement",
        "of weights and the last K anchors",
    ),
    ("detector", "adwin", "monitoring.detectors:adwin", "adaptive windowing"),
    ("detector", "kswin", "monitoring.detectors:kswin", "Kolmogorov-Smirnov windowing"),
    ("detector", "page_hinkley", "monitoring.detectors:page_hinkley", "Page-Hinkley test"),
    ("detector", "ensemble", "monitoring.detectors:ensemble", "a vote among several detectors"),
    ("source", "digits", "data.sources.arrays:digits", "1,797 handwritten digits"),
    ("source", "arrays", "data.sources.arrays:arrays", "x and y from .npz or .npy files"),
    ("source", "table", "data.sources.table:table_rows", "rows of CSV or Parquet files"),
    ("source", "folder", "data.sources.folder:folder", "class folders of images"),
    ("source", "torch", "data.sources.own:torch", "a dataset of torch's that your function makes"),
    ("source", "mnist", "data.sources.vision:mnist", "MNIST and its like: IDX files, or an .npz"),
    ("source", "cifar10", "data.sources.vision:cifar10", "CIFAR-10, binary version"),
    ("source", "cifar100", "data.sources.vision:cifar100", "CIFAR-100, binary version"),
    ("source", "hf", "data.sources.huggingface:hf", "a Hugging Face dataset, on disk or the hub"),
    ("source", "text", "data.sources.text:text", "text files as token ids, by domain"),
    ("source", "jsonl", "data.sources.records:jsonl", "texts in lines of JSON, as token ids"),
    ("source", "hf_text", "data.sources.records:hf_text", "texts of a Hugging Face dataset"),
    ("source", "shards", "data.shards.open:shards", "a folder of WebDataset shards"),
    ("transform", "resize", "data.transforms:resize", "images scaled to one size"),
    ("transform", "to_rgb", "data.transforms:to_rgb", "images of three channels"),
    ("transform", "to_grey", "data.transforms:to_grey", "images of one channel"),
    ("transform", "crop", "data.transforms:crop", "a square of each image"),
    ("transform", "flip", "data.transforms:flip", "half of training images mirrored"),
    ("transform", "normalize", "data.transforms:normalize", "minus mean, by deviation"),
    ("drift", "none", "data.drift:Identity", "no drift"),
    ("drift", "rotate", "data.drift:Rotate", "images turned by an angle per experience"),
    ("drift", "affine", "data.drift:Affine", "cumulative random affine maps"),
    ("drift", "permute", "data.drift:Permute", "features permuted per experience"),
    ("drift", "noise", "data.drift:Noise", "growing Gaussian noise"),
    ("drift", "blur", "data.drift:Blur", "growing Gaussian blur"),
    ("drift", "split", "data.drift:Split", "new classes per experience"),
    ("drift", "label_shift", "data.drift:LabelShift", "other shares of the classes"),
    ("metric", "loss", "monitoring.metrics:LossMetric", "loss of each sample"),
    ("metric", "error", "monitoring.metrics:ErrorMetric", "1 where the model is wrong, else 0"),
    ("metric", "accuracy", "monitoring.metrics:AccuracyMetric", "1 where the model is right, or 0"),
    ("metric", "entropy", "monitoring.metrics:EntropyMetric", "of the outputs; needs no labels"),
    (
        "metric",
        "input_distance",
        "monitoring.metrics:input_distance",
        "of a sample to those trained on; needs no labels",
    ),
    ("score", "accuracy", "training.scores:AccuracyScore", "share of right samples"),
    ("score", "r2", "training.scores:R2Score", "R² of regression"),
    ("score", "loss", "training.scores:LossScore", "the loss; less is better"),
    ("score", "perplexity", "training.scores:PerplexityScore", "of all tokens; less is better"),
    (
        "score",
        "bits_per_byte",
        "training.scores:BitsPerByteScore",
        "cross entropy in bits, where tokens are bytes; less is better",
    ),
    ("score", "token_accuracy", "training.scores:TokenAccuracyScore", "share of right tokens"),
    ("score", "top_k", "training.class_scores:TopKScore", "class among the k largest outputs"),
    ("score", "f1_macro", "training.class_scores:F1MacroScore", "F1, mean over classes"),
    ("score", "auroc", "training.class_scores:AurocScore", "of each class against the rest"),
    ("model", "mlp", "models.reference:MLP", "multi-layer perceptron"),
    ("model", "cnn", "models.reference:CNN", "three convolutions with GroupNorm"),
    ("model", "resnet18", "models.reference:ResNet18", "ResNet-18 with a stem for small images"),
    ("model", "vit_tiny", "models.reference:ViT", "small vision transformer"),
    ("model", "decoder", "models.reference:Decoder", "small causal transformer over token ids"),
    ("optimizer", "sgd", "torch.optim:SGD", "stochastic gradient descent"),
    ("optimizer", "adam", "torch.optim:Adam", "adaptive moments"),
    ("optimizer", "adamw", "torch.optim:AdamW", "Adam with decoupled weight decay"),
    ("loss", "cross_entropy", "losses:cross_entropy", "softmax cross entropy of classes"),
    ("loss", "next_token", "losses:next_token", "each token, foretold by those before it"),
    ("loss", "mse", "losses:mse", "squared difference"),
    ("loss", "bce", "losses:bce", "binary cross entropy of logits"),
)
"""Kind, name, where it lies in this package (or torch), and what it is."""

_parts: dict[tuple[str, str], RegisteredPart] = {
    (k, n): RegisteredPart(k, n, t if t.startswith("torch.") else f"distcl.{t}", d)
    for k, n, t, d in _TABLE
}

OBJECT = "<object> "
"""What the name of an object begins with that a run was given in place of a name."""


def register(kind: str, name: str, factory: str | Factory, description: str = "") -> None:
    """Add a part, or replace one. ``factory`` is an object or its ``package.module:attribute``."""
    if kind not in kinds():
        raise ConfigError(f"register: unknown kind '{kind}'{nearest(kind, kinds())}")
    _parts[kind, name] = RegisteredPart(kind, name, factory, description)


@contextmanager
def objects(given: Sequence[tuple[str, Factory]]) -> Iterator[list[str]]:
    """Let objects, (kind, object), be parts inside; gives the name of each, in their order.

    That is ``<object> package.module:name``, of a function or class itself, else of the class.
    """
    before, names = dict(_parts), list[str]()
    for kind, part in given:
        named = getattr(part, "func", part)  # of functools.partial
        named = named if hasattr(named, "__name__") else type(named)
        name = f"{OBJECT}{named.__module__}:{named.__name__}"
        while (kind, name) in before and before[kind, name].target is not part:
            name += "'"  # another object of the same class is lent already
        user_packages.add(named.__module__.partition(".")[0])
        _parts[kind, name] = RegisteredPart(kind, name, part, "an object given to this run")
        names.append(name)
    try:
        yield names
    finally:
        _parts.clear()
        _parts.update(before)


def kinds() -> list[str]:
    """Every kind of part, sorted."""
    return sorted({k for k, _ in _parts})


def parts(kind: str) -> list[RegisteredPart]:
    """Every registered part of a kind, in order of registration."""
    return [p for p in _parts.values() if p.kind == kind]


def check(kind: str, name: str) -> str:
    """Return ``name`` if it is registered or has the form of a user's own; else ConfigError."""
    if (kind, name) in _parts or name.count(":") == 1:
        return name
    known = [p.name for p in parts(kind)]
    raise ConfigError(
        f"unknown {kind} '{name}'{nearest(name, known)}; known: {', '.join(known)}, "
        "or your own as package.module:attribute"
    )


GIVEN = ("config", "data")
"""Parameters of a source's factory that are no options."""


def options_of(kind: str, name: str) -> list[tuple[str, str]]:
    """Return the options of a part: name, and default as TOML would have it, "" where needed."""
    found = []
    for option in inspect.signature(resolve(kind, name)).parameters.values():
        if option.name in GIVEN or option.kind is option.VAR_KEYWORD:
            continue
        default = option.default
        if isinstance(default, tuple):
            default = list(default)
        shown = "" if default is option.empty else json.dumps(default)
        found.append((option.name, shown if shown != "null" else "none"))
    return found


def resolve(kind: str, name: str) -> Factory:
    """Return the factory of a part, importing its module. Raises ConfigError naming what fails."""
    check(kind, name)
    if name.startswith(OBJECT) and (kind, name) not in _parts:
        keyword = "stream" if kind == "source" else kind
        raise ConfigError(
            f"{kind} '{name.removeprefix(OBJECT)}' was given as an object, which no file holds: go "
            f"on in Python, where it is given again as {keyword}=… (distcl.train, distcl.open_run)"
        )
    target = _parts[kind, name].target if (kind, name) in _parts else name
    if not isinstance(target, str):
        return target
    if "" not in sys.path:  # a console script does not have the user's folder on its path
        here = str(Path.cwd())
        sys.path.insert(0, here) if here not in sys.path else None
    user_packages.add(target.partition(":")[0].partition(".")[0])
    try:
        found: Any = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        where = f" (in your code: {found_at})" if (found_at := line_of_theirs(error)) else ""
        raise ConfigError(f"{kind} '{name}' cannot be imported: {error}{where}") from error
    if not callable(found):
        raise ConfigError(f"{kind} '{name}' is not callable")
    return found  # type: ignore[no-any-return]


def create(kind: str, name: str, *args: Any, options: dict[str, Any] | None = None) -> Any:
    """Build a part: its factory is called with ``args`` and, as keywords, the user's ``options``.

    An option that the factory does not take raises ConfigError with the nearest one that it does;
    so does one that it needs and is not given.
    """
    factory = resolve(kind, name)
    options = options or {}
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin that does not tell what it takes
        return factory(*args, **options)
    known = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    known = known[len(args) :]
    for key in options:
        if key not in known and not takes_any:
            shown = ", ".join(name for name in known if name not in GIVEN) or "none"
            near = nearest(key, known) or ""
            raise ConfigError(f"{kind} '{name}' has no option '{key}'{near}; it takes: {shown}")
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise ConfigError(f"{kind} '{name}': {error}") from error
    return factory(*args, **options)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean 'x'?`` for the known name closest to ``name``, or ''."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""


# Options of a part, checked against the annotations of its factory.


P = ParamSpec("P")
R = TypeVar("R")

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A number between 0 and 1, both excluded."""


def checked(kind: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check types and ranges of a factory's arguments, as its annotations state them.

    What does not fit raises ConfigError naming ``<kind>.options.<argument>`` and the limit. Lists
    become tuples where the annotation says so, since TOML knows only lists.
    """

    def wrap(factory: Callable[P, R]) -> Callable[P, R]:
        settings = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        call = validate_call(config=settings)(factory)

        @functools.wraps(factory)
        def build(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return call(*args, **kwargs)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(piece) for piece in first["loc"])
                what = first["msg"][0].lower() + first["msg"][1:]
                got = reprlib.repr(first["input"])
                raise ConfigError(f"{kind}.options.{name}: {what}, not {got}") from None

        return build

    return wrap
