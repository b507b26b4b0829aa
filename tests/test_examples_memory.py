"""The examples about memory, at a tiny size: what they generate, train, print and leave."""

import itertools
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import associative_recall
import formal_languages
import look_inside


def brute_force(language, symbols):
    """The answer after all symbols, by the language's definition."""
    if language == "parity":
        return symbols.count(1) % 2
    if language == "even pairs":
        pairs = list(itertools.pairwise(symbols))
        return (pairs.count((0, 1)) + pairs.count((1, 0))) % 2
    if language == "cycle navigation":
        place = 0
        for symbol in symbols:
            place = (place + {0: -1, 1: 0, 2: 1}[symbol]) % 5
        return place
    numbers, operators = symbols[0::2], symbols[1::2]
    operators = operators[: len(numbers) - 1]  # the last may still wait for its number
    text = "(" * len(operators) + str(numbers[0])
    for operator, number in zip(operators, numbers[1:], strict=True):
        text += f"{'+-*'[operator - 5]}{number})"
    return eval(text) % 5


@pytest.mark.parametrize("language", formal_languages.LANGUAGES)
def test_languages_are_what_they_are_called(language):
    generate, symbols, answers = formal_languages.LANGUAGES[language]
    x, y = generate(np.random.default_rng(0), (20, 23))
    for row, wanted in zip(x.tolist(), y.tolist(), strict=True):
        assert wanted == [brute_force(language, row[: t + 1]) for t in range(23)]
    assert set(np.unique(x)) == set(range(symbols)) and set(np.unique(y)) == set(range(answers))


@pytest.mark.parametrize("mixer", formal_languages.MIXERS)
def test_models_answer_at_once(mixer):
    """What a model answers after a symbol does not change with what comes later."""
    model = formal_languages.new_model(mixer, 3, 5)
    x = np.random.default_rng(0).integers(3, size=(2, 12))
    first, whole = (keras.ops.convert_to_numpy(model(z)) for z in (x[:, :7], x))
    assert whole.shape == (2, 12, 5)
    np.testing.assert_allclose(whole[:, :7], first, rtol=1e-4, atol=1e-4)


def test_formal_languages(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name, size in dict(TESTS=8, TEST_LENGTH=20, TRAIN_LENGTH=10, SHOWN=(5, 20)).items():
        monkeypatch.setattr(formal_languages, name, size)
    monkeypatch.setattr(formal_languages, "BATCH", 16)
    accuracy = formal_languages.accuracy_by_length("even pairs", "sLSTM", steps=10)
    assert accuracy.shape == (20,) and (accuracy >= 0).all() and (accuracy <= 1).all()
    accuracies = {("even pairs", "sLSTM"): accuracy}
    formal_languages.print_table(accuracies)
    assert "| even pairs | sLSTM | " in capsys.readouterr().out
    formal_languages.plot(accuracies, "picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_question_can_be_answered():
    n = np.array([1, 2, 5, associative_recall.MAX_PAIRS])
    x, y, weight = associative_recall.recall(np.random.default_rng(0), n)
    keys = associative_recall.KEYS
    assert weight.sum(axis=1).tolist() == n.tolist()
    for tokens, answers, asked, pairs in zip(x, y, weight > 0, n, strict=True):
        shown = tokens[: 2 * pairs].reshape(-1, 2)
        memory = {key: value - keys for key, value in shown.tolist()}
        assert len(memory) == pairs and all(0 <= key < keys for key in memory)
        assert asked[2 * pairs : 3 * pairs].all()
        assert sorted(tokens[asked]) == sorted(memory)  # each key once
        assert [memory[key] for key in tokens[asked]] == answers[asked].tolist()
        assert (tokens[3 * pairs :] == associative_recall.BLANK).all()
    assert (x[3, 0 : 2 * n[3] : 2] != x[3, 2 * n[3] :]).any()  # in another order


def test_associative_recall(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = dict(KEYS=6, VALUES=2, BLANK=8, MAX_PAIRS=2, TESTS=8, SHOWN=(1, 2))
    for name, size in sizes.items():
        monkeypatch.setattr(associative_recall, name, size)
    weights = {}
    for kind in associative_recall.KINDS:
        weights[kind] = associative_recall.new_model(kind).count_params()
    assert max(weights.values()) < 1.25 * min(weights.values())
    model = associative_recall.new_model("LSTM")
    losses = associative_recall.train(model, steps=32, batch=16)
    assert losses[-1] < losses[0]
    accuracies = {"LSTM": {n: associative_recall.accuracy(model, n) for n in (1, 2)}}
    associative_recall.print_table(accuracies)
    assert f"| LSTM | {accuracies['LSTM'][1]:.2f} | " in capsys.readouterr().out
    associative_recall.plot(accuracies, "picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


def test_look_inside(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(look_inside, "TEXT", look_inside.TEXT[:30])
    traces = look_inside.look(look_inside.new_model(hidden_dim=16), look_inside.TEXT)
    assert [t.kind for t in traces] == ["mlstm", "slstm", "mlstm"]
    look_inside.print_table(traces)
    assert "| stack/block_2/mlstm | " in capsys.readouterr().out
    look_inside.plot(traces, look_inside.TEXT, "picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
