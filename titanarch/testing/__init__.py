"""Tests of components that their author does not write: the contract, checked on one process and on several."""
