"""The examples that put xLSTM layers in an LSTM's place, each at a tiny size."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(request):
    """The module of that name, fresh, so that a test may set its sizes."""
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["forecast"], indirect=True)
def test_forecast(example, tmp_path):
    example.WINDOW, example.AHEAD = 12, np.array([3, 60])
    picture = tmp_path / "forecast.png"
    rows = example.main(
        steps=10, batch_size=8, models=["SLSTM, MLSTM"], seeds=[0], path=str(picture)
    )
    assert rows["seasonal naive"]["pinball"] < rows["all years"]["pinball"]
    row = rows["SLSTM, MLSTM"]
    assert row["loss"][0][-1] < row["loss"][0][0]
    assert np.isfinite(row["pinball"]) and 0 < row["inside"] < 1
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("example", ["forecast"], indirect=True)
def test_forecast_sees_nothing_of_what_it_forecasts(example, monkeypatch):
    """The sums of a window and of its targets tell which months they are from."""
    series, seen = np.arange(500.0, dtype="float32"), {}

    class Model:
        compile = input = output = property(lambda self: lambda *args: None)

        def fit(self, x, y, **kwargs):
            seen.update(x=x[..., 0], y=y)
            return self

        history = {"loss": []}

    monkeypatch.setattr(example, "scaled", lambda x: x)
    example.train(Model(), series, steps=50, batch_size=4, seed=0)
    assert seen["x"].shape == (200, example.WINDOW)
    np.testing.assert_array_equal(seen["y"] - seen["x"][..., None], seen["y"] * 0 + example.AHEAD)
    assert seen["y"].max() == len(series) - 1


@pytest.mark.parametrize("example", ["classify"], indirect=True)
def test_classify(example, tmp_path):
    picture = tmp_path / "classify.png"
    rows = example.main(epochs=3, digits=64, layers=["SLSTM"], seeds=[0], path=str(picture))
    loss = rows["SLSTM"]["loss"]
    assert loss[-1] < loss[0]
    assert np.isfinite(rows["SLSTM"]["val_loss"]).all()
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("example", ["classify"], indirect=True)
def test_each_digit_is_all_of_its_ink(example):
    x, _ = example.load_sequences()
    lengths = x.any(axis=2).sum(axis=1)
    assert lengths.min() == 16 and lengths.max() == x.shape[1] == 42
    images = np.zeros((len(x), 8, 8))
    for image, steps, length in zip(images, x, lengths, strict=True):
        row, column = (4 * steps[:length, :2]).astype(int).T
        image[row, column] = 16 * steps[:length, 2]
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(images, load_digits().images)


@pytest.mark.parametrize("example", ["streaming"], indirect=True)
def test_streaming(example, tmp_path):
    stream = example.mackey_glass(130)
    model, step, state = example.new_models(width=8)
    forecasts, seconds, memory = example.run(example.compiled(step), state, stream)
    offline = model.predict(stream[None, :, None], verbose=0)[0, :, 0]
    np.testing.assert_allclose(forecasts, offline, atol=1e-4)  # norms of few units add noise
    assert np.ptp(offline) > 0.01
    assert (seconds > 0).all() and len(memory) == 2
    example.plot(stream, forecasts, seconds, tmp_path / "streaming.png")
    assert (tmp_path / "streaming.png").stat().st_size > 1000


@pytest.mark.parametrize("example", ["streaming"], indirect=True)
def test_streaming_baseline(example):
    """Least squares forecasts what a linear recurrence gives."""
    wave = np.sin(np.arange(2000) / 5)
    forecast, start = example.linear(wave[:1500], wave[1500:]), example.LAGS - 1
    after = wave[1500 + start + example.AHEAD :]
    np.testing.assert_allclose(forecast[start : -example.AHEAD], after, atol=1e-6)
