"""Imports every component, so that all are registered; what reads a configuration imports this first."""

from titanarch.models import activations, channels, decoder, elephant, isotropic, linears, norms, positions
from titanarch.models.hnet import model as hnet
from titanarch.models.ebt import model as ebt
from titanarch.models.mixers import attention, diff_attention, external, mla

REGISTERED = (activations, attention, channels, decoder, diff_attention, elephant, ebt, external, hnet, isotropic, linears, mla, norms, positions)
