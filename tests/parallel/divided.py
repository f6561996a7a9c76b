"""A model divided over the processes of a distributed test. Not a test by itself."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import titanarch.models.components  # noqa: F401 (registers all)
from titanarch.contract.init import qualified_names
from titanarch.contract.model import MODELS, Model
from titanarch.models.decoder import Decoder
from titanarch.models.decoder_config import DecoderConfig
from titanarch.models.language_config import LanguageModelConfig
from titanarch.parallel.apply import materialize, parallelize
from titanarch.parallel.check import decide_division
from titanarch.parallel.config import ActivationCheckpointConfig, CompileConfig, Float8Config, ParallelismConfig
from titanarch.parallel.mesh import Mesh, build_mesh, resolve_degrees

SEED = 3
Table = Mapping[str, Any]


def divided_decoder(table: Table, **options: Any) -> tuple[Decoder, Mesh]:
    """``divided_model`` of a decoder's [model] table."""
    model, mesh = divided_model(DecoderConfig.model_validate(table), **options)
    assert isinstance(model, Decoder)
    return model, mesh


def divided_model(
    config: LanguageModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    parallelism: Table,
    activation_checkpoint: Table | None = None,
    compile_table: Table | None = None,
    float8: Table | None = None,
    param_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
) -> tuple[Model, Mesh]:
    """The model of ``config`` on this process, with weights by ``SEED``, and the mesh. Tables as in a configuration."""
    layout = ParallelismConfig.model_validate(parallelism)
    with torch.device("meta"):
        model = MODELS.of(config)(config, vocab_size, seq_len)
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
