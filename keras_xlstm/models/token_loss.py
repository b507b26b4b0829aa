import keras

from keras_xlstm.ops.linear import cross_entropy


@keras.saving.register_keras_serializable("keras_xlstm")
class TokenLoss(keras.losses.Loss):
    """`keras.losses.SparseCategoricalCrossentropy(from_logits=True)`, with fewer copies of logits.

    Targets are ids, (B, S), predictions logits, (B, S, vocabulary_size).
    """

    def __init__(self, name="token_loss", **kwargs):
        super().__init__(name=name, **kwargs)

    def call(self, y_true, y_pred):
        return cross_entropy(y_pred, y_true)
