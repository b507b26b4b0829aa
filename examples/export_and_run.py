"""Exports a language model, and lets a program without Keras decode with it.

    KERAS_BACKEND=torch python examples/export_and_run.py         an ONNX file, for onnxruntime
    KERAS_BACKEND=tensorflow python examples/export_and_run.py    likewise, by another way

Takes the model of `quickstart.py`, which must have run here before. Needs `pip install
onnxruntime` and `onnxscript` (PyTorch) or `tf2onnx` (TensorFlow). Leaves `step.onnx`: one token
and the state in, logits and the next state out.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import keras
import numpy as np
import onnxruntime

from keras_xlstm.models import XLSTMCausalLM

PROMPT, LENGTH = "The with statement", 100


def main():
    lm = XLSTMCausalLM.from_preset("quickstart_preset")
    step = lm.step_model()
    one = [  # for one text at a time
        keras.InputSpec(shape=(1, *x.shape[1:]), dtype=x.dtype, name=x.name) for x in step.inputs
    ]
    step.export("step.onnx", format="onnx", input_signature=[one], verbose=False)

    start = time.time()
    text = decode("step.onnx", PROMPT, LENGTH)
    print(f"{text}\n\nstep.onnx took {(time.time() - start) / LENGTH * 1e3:.1f} ms a token")
    lm.compile(sampler="greedy")
    assert text == lm.generate(PROMPT, max_length=LENGTH, stop_token_ids=None), "Keras differs"
    print("Keras continues identically.")


def decode(path, prompt, length):
    """Greedy decoding, byte by byte: what the program on the other side does."""
    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]
    state = [np.zeros(x.shape, "float32") for x in session.get_inputs()[1:]]
    tokens = [byte + 2 for byte in prompt.encode()]  # ids 0 and 1 are special
    for position in range(length - 1):
        token = np.array([[tokens[position]]], "int32")
        logits, *state = session.run(None, dict(zip(names, [token, *state], strict=True)))
        if position + 1 == len(tokens):
            tokens.append(int(logits[0, -1].argmax()))
    return bytes(token - 2 for token in tokens if token > 1).decode(errors="replace")


if __name__ == "__main__":
    main()
