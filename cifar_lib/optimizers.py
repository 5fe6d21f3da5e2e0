"""What Keras' optimisers have not: Muon for filters, and a linear schedule with a warm-up."""

from __future__ import annotations

from cifar_lib.backend import keras

ops = keras.ops

# The coefficients of the quintic iteration in Keras' `Muon` and in its source.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix, steps: int):
    """Move every singular value of a matrix (M, N) towards 1 by Newton-Schulz iterations.

    After 5 steps they lie within about 0.7 to 1.2, unless they were thousands of times smaller than
    the Frobenius norm. Jordan et al. 2024, "Muon: an optimizer for hidden layers",
    https://kellerjordan.github.io/posts/muon. Products of the matrix are computed in its own type.
    """
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = ops.transpose(matrix) if rows > columns else matrix
    x = x / ops.cast(ops.norm(ops.cast(x, "float32")) + 1e-7, x.dtype)
    # The steps x -> p(x x') x commute with x x', so they are multiplied in the smaller of the two
    # sizes, and the large matrix is used twice, not twice a step.
    gram = ops.cast(x @ ops.transpose(x), "float32")
    product = identity = ops.eye(gram.shape[0], dtype="float32")
    for step in range(steps):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial @ product if step else polynomial
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    x = ops.cast(product, x.dtype) @ x
    return ops.transpose(x) if rows > columns else x


@keras.saving.register_keras_serializable("cifar_lib")
class LinearSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linearly from 0 to the peak, then linearly to 0, which the step after the last would have.

    The one-cycle schedule without its tail: Smith & Topin 2018, "Super-convergence", arXiv
    1708.07120; as in airbench, arXiv 2404.00498.

    Args:
        peak: the largest learning rate.
        steps: of all training.
        warmup: the share of the steps before the peak, in 0..1.
    """

    def __init__(self, peak: float, steps: int, warmup: float) -> None:
        self.peak, self.steps, self.warmup = peak, steps, warmup

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = self.warmup * self.steps
        # The first step is not wasted on a rate of 0.
        up = (step + 1) / rising if rising else 1.0
        down = (self.steps - step) / max(1.0, self.steps - rising)
        return self.peak * ops.maximum(ops.minimum(ops.minimum(up, down), 1.0), 0.0)

    def get_config(self) -> dict:
        return {"peak": self.peak, "steps": self.steps, "warmup": self.warmup}


@keras.saving.register_keras_serializable("cifar_lib")
class Muon(keras.optimizers.SGD):
    """Muon for convolution filters, Nesterov SGD for all else.

    `keras.optimizers.Muon` steps 2-D variables alone, and gives filters AdamW. Here a filter bank
    (height, width, inputs, outputs) is the matrix of its outputs by all else: it is scaled to the
    Frobenius norm sqrt(outputs), then moved along the orthogonalised Nesterov momentum.
    https://kellerjordan.github.io/posts/muon; the settings and the scaling are those of the
    CIFAR-100 speedrun's submission NAVIER-STOKED.

    Args:
        learning_rate: of what is not a filter, or a schedule of it.
        filter_rate: the filters' learning rate, as a multiple of that.
        momentum: of what is not a filter.
        filter_momentum: of the filters.
        steps: Newton-Schulz iterations.
        compute_dtype: of these iterations.
        arguments: of `keras.optimizers.SGD`.
    """

    def __init__(
        self,
        learning_rate,
        filter_rate: float,
        *,
        momentum: float = 0.9,
        filter_momentum: float = 0.6,
        steps: int = 3,
        compute_dtype: str = "float32",
        **arguments: object,
    ) -> None:
        super().__init__(learning_rate, momentum=momentum, nesterov=True, **arguments)
        self.filter_rate, self.filter_momentum = filter_rate, filter_momentum
        self.steps, self.compute_dtype = steps, compute_dtype

    def update_step(self, gradient, variable, learning_rate) -> None:
        if len(variable.shape) != 4:
            super().update_step(gradient, variable, learning_rate)
            return
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, momentum * self.filter_momentum + gradient)
        step = gradient + momentum * self.filter_momentum
        outputs = variable.shape[-1]
        step = ops.cast(ops.reshape(step, (-1, outputs)), self.compute_dtype)
        step = ops.reshape(orthogonalize(step, self.steps), variable.shape)
        rate = ops.cast(learning_rate, variable.dtype) * self.filter_rate
        scale = outputs**0.5 / (ops.norm(ops.reshape(variable, (-1,))) + 1e-7)
        self.assign(variable, variable * scale - rate * ops.cast(step, variable.dtype))

    def get_config(self) -> dict:
        names = ("filter_rate", "filter_momentum", "steps", "compute_dtype")
        config = super().get_config() | {name: getattr(self, name) for name in names}
        del config["nesterov"]
        return config
