"""Optimizer state, gradients and weights partitioned by DeepSpeed (ZeRO-1, 2, 3)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.utils._pytree import tree_map_only

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import UsageError
from distcl.parallel.deepspeed_config import deepspeed_config
from distcl.parallel.partition import Partition
from distcl.parallel.strategy import (
    MakeOptimizer,
    Strategy,
    join_alone,
    refuse_batchnorm,
    refuse_scalars,
    trainable,
)
from distcl.parallel.zero12 import Zero12

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_deepspeed() -> Any:
    """Import DeepSpeed, quietly and without building anything on a CPU machine. Local."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
        import transformers  # noqa: F401  (Accelerate needs it for DeepSpeed)
    except ImportError as error:
        raise UsageError(
            f"parallel.strategy = 'zero1', 'zero2' and 'zero3' need {error.name}; "
            "type: pip install 'distcl[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # else it compiles C++ for most of a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


class Zero(Strategy):
    """``zero1``, ``zero2``, ``zero3``: through Accelerate's DeepSpeed plugin.

    Under bf16 and fp16 the weights are half precision and the optimizer keeps float32 masters;
    gradients are accumulated in float32. Inputs are cast on the way into the model, outputs on the
    way out.
    """

    def __init__(self, run: RunConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        super().__init__(run, parallel, training)
        self._deepspeed = load_deepspeed()
        self.stage = int(parallel.strategy.removeprefix("zero"))
        handlers = [InitProcessGroupKwargs(timeout=self.timeout)]
        if not torch.cuda.is_available():  # Accelerator(cpu=True) would drop the plugin
            PartialState(cpu=True, timeout=self.timeout)
        os.environ.setdefault("LOCAL_RANK", "0")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        config = deepspeed_config(run, parallel, training, world)
        # Accelerate takes these for settings of its own, besides the configuration.
        for name in [n for n in os.environ if n.startswith("ACCELERATE_DEEPSPEED_")]:
            del os.environ[name]
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)
        if self.accelerator.distributed_type is not DistributedType.DEEPSPEED:
            raise UsageError(
                f"parallel.strategy = '{self.name}', but Accelerate did not take up "
                f"DeepSpeed ({self.accelerator.distributed_type})"
            )
        join_alone(self.accelerator)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """See the base class.

        Raises UsageError without an optimizer, which ZeRO partitions, and for a scalar parameter.
        """
        if make_optimizer is None:
            raise UsageError(
                f"parallel.strategy = '{self.name}' prepares a model together with "
                "its optimizer: use Runtime.prepare_training"
            )
        refuse_scalars(model, self.name)
        refuse_batchnorm(model, self.name, self.precision)
        device, dtype = self.accelerator.device, _DTYPES[self.precision]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if dtype is not torch.float32:
            _cast_on_the_way(model, dtype)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory reports
            if self.stage == 3:  # one parameter after another: no device ever holds the model
                settings = dict(self.accelerator.deepspeed_plugin.deepspeed_config)
                settings.pop("steps_per_print")  # infinite, which only Accelerate's way accepts
                self._deepspeed.zero.Init(module=model, config_dict_or_path=settings)
                for buffer in model.buffers():
                    buffer.data = buffer.data.to(device)
            self.accelerator.deepspeed_engine_wrapped = None  # backward is the newest engine's
            engine, _ = self.accelerator.prepare(model, make_optimizer(trainable(model)))
        if int(engine.zero_optimization_stage()) != self.stage:
            raise UsageError(
                f"parallel.strategy = '{self.name}', but DeepSpeed runs stage "
                f"{engine.zero_optimization_stage()}"
            )
        return engine, EngineOptimizer(engine)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """See the base class."""
        return model.module if isinstance(model, self._deepspeed.DeepSpeedEngine) else model

    def backward(self, loss: torch.Tensor) -> None:
        """See the base class. Accelerate's own would also step."""
        self.accelerator.deepspeed_engine_wrapped.engine.backward(loss)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See the base class."""
        engine: Any = model
        engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """See the base class."""
        if isinstance(optimizer, EngineOptimizer):
            optimizer.unscale()

    def partition(self, runtime: Runtime, model: nn.Module) -> Partition:
        """See the base class."""
        if not isinstance(model, self._deepspeed.DeepSpeedEngine):
            raise UsageError(f"parallel.strategy = '{self.name}': the model was not prepared")
        if self.stage < 3:
            return Zero12(runtime, model)
        from distcl.parallel.zero3 import Zero3  # which imports DeepSpeed

        return Zero3(runtime, model)


def _cast_on_the_way(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point inputs of a module to ``dtype``, and its outputs to float32."""

    def to(wanted: torch.dtype, tree: Any) -> Any:
        return tree_map_only(
            torch.Tensor, lambda t: t.to(wanted) if t.is_floating_point() else t, tree
        )

    model.register_forward_pre_hook(
        lambda _, args, kwargs: (to(dtype, args), to(dtype, kwargs)), with_kwargs=True
    )
    model.register_forward_hook(lambda _, args, outputs: to(torch.float32, outputs))


class EngineOptimizer(torch.optim.Optimizer):
    """A DeepSpeed engine's step and gradients behind the methods of torch's optimizers."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._unscaled = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside; setting their ``lr`` works."""
        groups: list[dict[str, Any]] = self._zero.optimizer.param_groups
        return groups

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of the optimizer inside, of this rank's part of the weights."""
        state: dict[Any, Any] = self._zero.optimizer.state
        return state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step; then the weights are made from the masters. Collective."""
        if self._unscaled:  # the scale is out of the gradients already
            self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, 1.0
        try:
            self._engine.step()
        finally:
            self._zero.custom_loss_scaler, self._zero.external_loss_scale = False, None
            self._unscaled = False

    def unscale(self) -> None:
        """Take the loss scale out of the gradients, once a step. Local."""
        scale = getattr(self._zero, "loss_scale", 1.0)
        if scale != 1.0 and not self._unscaled:
            for gradient in reduced_gradients(self._zero):
                gradient.div_(scale)
            self._unscaled = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, also those that are averaged already. Local."""
        zero = self._zero
        self._unscaled = False
        if hasattr(zero, "fp32_groups_gradients_flat"):  # ZeRO-1 in bf16
            zero.clear_hp_grads()
            zero.clear_lp_grads(set_to_none=True)
            return
        zero.zero_grad(set_to_none=True)
        for gradient in reduced_gradients(zero):
            gradient.zero_()
        if hasattr(zero, "single_partition_of_fp32_groups"):
            zero.micro_step_id = -1  # the next backward is the first of its step
            for i in zero.averaged_gradients:
                zero.averaged_gradients[i] = None
            for i in zero.all_grad_tensors:
                zero.all_grad_tensors[i] = None


def reduced_gradients(zero: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in which a ZeRO optimizer keeps this rank's averaged gradients. Local."""
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # ZeRO-1 in bf16
        yield from zero.fp32_groups_gradient_flat_partition
    elif hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO-3
        yield zero.grad_partitions_flat_buffer
        if zero.offload_optimizer:
            yield from (p.grad for p in zero.fp32_partitioned_groups_flat)
    elif zero.cpu_offload:
        yield from (p.grad for p in zero.single_partition_of_fp32_groups)
    else:
        for gradients in zero.averaged_gradients.values():
            yield from gradients or ()
