"""What a configuration leaves open is settled once, before anything is built, and recorded."""

import torch

from titanarch.train.run_config import DType, RunConfig

DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_dtype(device_type: str) -> DType:
    """The dtype that ``auto`` stands for: bfloat16 where the hardware multiplies matrices in it."""
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # A CPU without matrix tiles widens bfloat16 before it multiplies, which is slower than float32.
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def resolve(config: RunConfig, *, seed: int, device_type: str) -> RunConfig:
    """``config`` with its seed and its dtype of compute filled in."""
    training = config.training
    if training.mixed_precision_param == "auto":
        training = training.model_copy(update={"mixed_precision_param": best_dtype(device_type)})
    return config.model_copy(update={"training": training, "debug": config.debug.model_copy(update={"seed": seed})})


def param_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of compute of a resolved configuration."""
    name = config.training.mixed_precision_param
    assert name != "auto", "the configuration is resolved before anything is built"
    return DTYPES[name]


def local_batch_size(config: RunConfig, data_parallel: int) -> int:
    """Rows of a forward on one process in the run's last phase; before ``auto`` is settled the fewest that it may become."""
    return config.training.run_phases(data_parallel).parts[-1].local_batch_size
