"""Checkpoints of other libraries, in and out.

Those of `transformers` open by `XLSTMCausalLM.from_preset(folder)` and are written by
`export_to_transformers(folder)`; those of NX-AI's `xlstm` package by the functions here.
"""

from keras_xlstm.converters.xlstm import from_xlstm, state_from_xlstm, state_to_xlstm, to_xlstm

__all__ = ["from_xlstm", "state_from_xlstm", "state_to_xlstm", "to_xlstm"]
