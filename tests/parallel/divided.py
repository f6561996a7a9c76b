"""The decoder divided over the processes of a distributed test. Not a test by itself."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.init import qualified_names
from titanarch.models.decoder import Decoder, DecoderConfig
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.mesh import Mesh, build_mesh, resolve_degrees

SEED = 3
Table = Mapping[str, Any]


def divided_decoder(
    table: Table,
    *,
    vocab_size: int,
    seq_len: int,
    parallelism: Table,
    activation_checkpoint: Table | None = None,
    compile_table: Table | None = None,
    float8: Table | None = None,
    param_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, Mesh]:
    """The model of ``table`` on this process, with weights by ``SEED``, and the mesh. Tables as in a configuration."""
    config, layout = DecoderConfig.model_validate(table), ParallelismConfig.model_validate(parallelism)
    with torch.device("meta"):
        model = Decoder(config, vocab_size, seq_len)
    names = qualified_names(model)
    degrees = resolve_degrees(layout, dist.get_world_size())
    mesh = build_mesh(degrees, "cpu")
    parallelize(
        model,
        mesh,
        decide_division(model, layout, degrees, seq_len=seq_len, device_type="cpu"),
        vocab_size=vocab_size,
        parallelism=layout,
        activation_checkpoint=ActivationCheckpointConfig.model_validate(activation_checkpoint or {}),
        compile_config=CompileConfig.model_validate(compile_table or {}),
        float8=Float8Config.model_validate(float8 or {}),
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
    )
    materialize(model, names, config.init, seed=SEED, device=torch.device("cpu"))
    return model, mesh
