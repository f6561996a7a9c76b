"""Imports every component, so that all are registered; what reads a configuration imports this first."""

from titanarch.models import activations, channels, decoder, norms, positions
from titanarch.models.mixers import attention, external

REGISTERED = (activations, attention, channels, decoder, external, norms, positions)
