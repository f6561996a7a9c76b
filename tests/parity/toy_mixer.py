"""Registers the fixture mixer, as a user's module named in ``experimental.custom_import`` would."""

from tests.fixtures.toy_ssm import ToySSM
from titanarch.contract.mixer import mixer

TOY = mixer("toy_ssm")(ToySSM)
