"""Imports every component, so that all are registered; what reads a configuration imports this first."""

from titanarch.models import activations, channels, decoder, elephant, isotropic, linears, norms, positions
from titanarch.models.ebt import model as ebt
from titanarch.models.encoder_decoder import model as encoder_decoder
from titanarch.models.hnet import model as hnet
from titanarch.models.mixers import attention, diff_attention, external, gated_delta_net, gla, kda, mamba2, mla, retnet, rwkv7, values_relu

REGISTERED = (
    activations,
    attention,
    channels,
    decoder,
    diff_attention,
    ebt,
    elephant,
    encoder_decoder,
    external,
    gated_delta_net,
    gla,
    hnet,
    isotropic,
    kda,
    linears,
    mamba2,
    mla,
    norms,
    positions,
    retnet,
    rwkv7,
    values_relu,
)
