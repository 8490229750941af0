"""Every illness that gradmend knows, in one table: rules name them, remedies treat them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Illness:
    """What there is to say of one cause.

    Args:
        sentence: what is wrong, in one plain sentence.
        why: why it happens.
        signs: how it shows.
        cure: what treats it.
        part: which part of the setup is to blame.
        reference: author, title, year, link.
    """

    sentence: str
    why: str
    signs: str
    cure: str
    part: str
    reference: str


class Cause(Enum):
    """An illness. Roots come before the symptoms that they bring about."""

    NON_FINITE = Illness(
        "Values are no longer numbers (NaN or infinite).",
        "A step too large, a division by zero, a logarithm of zero, an overflow in half precision, or NaN "
        "in the data itself. NaN spreads to everything computed from it.",
        "The loss prints as nan; the first site where it appears is the culprit, all later ones inherit it.",
        "Clean the data; lower the learning rate; clip the gradient; take the loss that works on logits.",
        "numerics",
        "Goldberg, What every computer scientist should know about floating-point arithmetic, 1991, "
        "https://doi.org/10.1145/103162.103163",
    )
    SOFTMAX_BEFORE_LOGITS_LOSS = Illness(
        "A softmax stands before a loss that applies softmax itself.",
        "`CrossEntropyLoss` takes raw scores (logits). Given probabilities it squeezes them into a softmax "
        "a second time: the loss cannot fall below about log(1 + (classes - 1)/e), and gradients shrink.",
        "Training is slow, the loss stops well above zero while accuracy may still rise.",
        "Remove the softmax from the model; apply it only when you want to read probabilities.",
        "output",
        "Goodfellow, Bengio, Courville, Deep Learning, section 6.2.2.3, 2016, "
        "https://www.deeplearningbook.org",
    )
    SIGMOID_BEFORE_LOGITS_LOSS = Illness(
        "A sigmoid stands before a loss that applies sigmoid itself.",
        "`BCEWithLogitsLoss` takes raw scores (logits). Given probabilities it sees values from 0 to 1 "
        "only, so its own sigmoid never leaves the range from 0.5 to 0.73.",
        "The loss stops near 0.5, predictions never fall below 0.5.",
        "Remove the sigmoid from the model, or take `BCELoss` (less exact).",
        "output",
        "Goodfellow, Bengio, Courville, Deep Learning, section 6.2.2.2, 2016, "
        "https://www.deeplearningbook.org",
    )
    NOT_IN_OPTIMIZER = Illness(
        "Parameters that want a gradient are not in the optimizer.",
        "The optimizer was made before these layers, or from the parameters of another model or of a part.",
        "They receive a gradient at every step and never change.",
        "Make the optimizer after the model, from `model.parameters()`.",
        "wiring",
        "PyTorch, torch.optim, https://docs.pytorch.org/docs/stable/optim.html",
    )
    NO_GRADIENT = Illness(
        "Parameters are never reached by the gradient.",
        "They are not used in forward, or a `detach()`, `.item()`, `no_grad()` or an integer operation cuts "
        "the path between them and the loss.",
        "Their `.grad` stays None.",
        "Use them, delete them, or remove what cuts the path.",
        "wiring",
        "PyTorch, Autograd mechanics, https://docs.pytorch.org/docs/stable/notes/autograd.html",
    )
    FROZEN_PARAMETERS = Illness(
        "Part of the network is frozen.",
        "`requires_grad` is False: these parameters keep their present values.",
        "They do not change. That is right for fine-tuning and wrong when they still hold random values.",
        "Call `requires_grad_(True)` on them if they are meant to learn.",
        "wiring",
        "PyTorch, Autograd mechanics, https://docs.pytorch.org/docs/stable/notes/autograd.html",
    )
    SYMMETRIC_WEIGHTS = Illness(
        "All units of a layer are identical and stay so.",
        "The weights were all set to one value. Equal units receive equal gradients, so the layer acts as "
        "one unit, whatever its width.",
        "The rows of the weight matrix are equal, and so are the rows of its gradient.",
        "Draw the weights at random (He for ReLU, Xavier for tanh).",
        "initialization",
        "Goodfellow, Bengio, Courville, Deep Learning, section 8.4, 2016, https://www.deeplearningbook.org",
    )
    UNSCALED_INPUT = Illness(
        "The inputs are far from unit scale.",
        "Initial weights and learning rates are made for inputs of mean 0 and deviation 1. Large inputs "
        "saturate units and make the loss steep; columns of very different size make it a narrow ravine.",
        "The input's root mean square is far from 1, or some columns are many times larger than others.",
        "Standardize the input: subtract the mean, divide by the standard deviation.",
        "input",
        "LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, https://doi.org/10.1007/3-540-49430-8_2",
    )
    INPUT_LOST = Illness(
        "Nothing of the input comes through: all samples are the same vector from the first layer on.",
        "All rows of the data are equal, or forward does not use its input, overwrites it or rounds it away.",
        "Outputs are the same for every sample, and the loss stays at that of guessing.",
        "Look at the first lines of forward, and at a few rows of the data as they reach the model.",
        "wiring",
        "Karpathy, A recipe for training neural networks, 2019, https://karpathy.github.io/2019/04/25/recipe/",
    )
    LEARNING_RATE_TOO_HIGH = Illness(
        "The learning rate is too high: a step jumps over the valley.",
        "Along its own direction the loss is lowest well before the step ends; beyond twice that length it "
        "rises again, so steps do harm.",
        "The loss jumps, oscillates or becomes NaN; a single step makes the same batch worse.",
        "Lower the learning rate to what the curvature allows; warm up; clip the gradient.",
        "learning_rate",
        "LeCun, Simard, Pearlmutter, Automatic learning rate maximization, 1992, "
        "https://proceedings.neurips.cc/paper/1992",
    )
    LEARNING_RATE_TOO_LOW = Illness(
        "The learning rate is too low: steps change next to nothing.",
        "The updates are so small beside the weights, and so far from where the loss is lowest along their "
        "direction, that training would take thousands of times longer than it needs to.",
        "The loss falls by less than a thousandth in a step that could be hundreds of times longer.",
        "Raise the learning rate.",
        "learning_rate",
        "Smith, Cyclical learning rates for training neural networks, 2017, https://arxiv.org/abs/1506.01186",
    )
    CONTRACTING_ACTIVATION = Illness(
        "The activation shrinks every signal, whatever the weights.",
        "Its slope is small compared with its output: each layer multiplies the squared gradient by "
        "E[f'(z)^2]/E[f(z)^2] at unit variance, 0.15 for the sigmoid, so depth multiplies tiny factors.",
        "Gradients fall by the same factor layer after layer, and no usual initialization cures it.",
        "Replace the activation (ReLU, tanh, GELU), or add normalization or residual connections.",
        "activation",
        "Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010, "
        "https://proceedings.mlr.press/v9/glorot10a.html",
    )
    WEIGHTS_TOO_SMALL = Illness(
        "The initial weights are too small for this activation and depth.",
        "Each layer multiplies the squared gradient by (fan-in x weight variance) x E[f'(z)^2]; below 1, the "
        "product over the layers vanishes. torch's own default for `nn.Linear` gives 1/6 with ReLU.",
        "Signals or gradients shrink by the same factor at every layer.",
        "Initialize for the activation: He for ReLU, Xavier or critical for tanh, orthogonal.",
        "initialization",
        "He, Zhang, Ren, Sun, Delving deep into rectifiers, 2015, https://arxiv.org/abs/1502.01852",
    )
    WEIGHTS_TOO_LARGE = Illness(
        "The initial weights are too large for this activation and depth.",
        "Each layer multiplies the squared gradient by (fan-in x weight variance) x E[f'(z)^2]; above 1, the "
        "product over the layers explodes. Bounded activations saturate as well.",
        "Signals or gradients grow by the same factor at every layer; neighbouring inputs become strangers.",
        "Initialize for the activation: He for ReLU, Xavier or critical for tanh, orthogonal.",
        "initialization",
        "Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016, "
        "https://arxiv.org/abs/1606.05340",
    )
    VANISHING_GRADIENT = Illness(
        "The gradient vanishes on its way to the first layers.",
        "The gradient at a layer is the product of the Jacobians after it. Factors below 1 make it shrink "
        "exponentially with depth, so the first layers hardly learn.",
        "The gradient at the pre-activations falls by a constant factor per layer.",
        "Initialization and activation that suit each other; normalization; residual connections.",
        "depth",
        "Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen, 1991; Bengio, Simard, Frasconi, "
        "Learning long-term dependencies with gradient descent is difficult, 1994, "
        "https://doi.org/10.1109/72.279181",
    )
    EXPLODING_GRADIENT = Illness(
        "The gradient explodes on its way to the first layers.",
        "The gradient at a layer is the product of the Jacobians after it. Factors above 1 make it grow "
        "exponentially with depth, so one step destroys the first layers.",
        "The gradient at the pre-activations grows by a constant factor per layer; the loss jumps or is NaN.",
        "Smaller initial weights; clipping by norm; normalization with residual connections.",
        "depth",
        "Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013, "
        "https://arxiv.org/abs/1211.5063",
    )
    INFORMATION_COLLAPSE = Illness(
        "Different inputs become the same vector on their way through the network.",
        "Each layer draws the directions of two inputs together; after many layers they agree to within "
        "rounding, and the last layers cannot tell them apart.",
        "The cosine between samples goes to 1 with depth; the loss stays at that of guessing.",
        "Critical or looks-linear initialization, another activation, residual connections, normalization.",
        "depth",
        "Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep information propagation, 2017, "
        "https://arxiv.org/abs/1611.01232",
    )
    SATURATED_UNITS = Illness(
        "Units are saturated: they sit where their activation is flat.",
        "Pre-activations are so large that the derivative of sigmoid or tanh is nearly 0, and no gradient "
        "passes.",
        "Outputs cluster at the ends of the activation's range.",
        "Smaller initial weights, scaled inputs, normalization before the activation, or ReLU-like units.",
        "initialization",
        "Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010, "
        "https://proceedings.mlr.press/v9/glorot10a.html",
    )
    DEAD_UNITS = Illness(
        "Units are dead: they give zero for every sample.",
        "A rectifier whose pre-activation is negative for all inputs has derivative 0 everywhere, so its "
        "weights get no gradient and it cannot come back.",
        "The same units are zero over whole batches.",
        "A lower learning rate, He initialization with zero bias, LeakyReLU or ELU, normalization.",
        "activation",
        "Lu, Shin, Su, Karniadakis, Dying ReLU and initialization, 2020, https://arxiv.org/abs/1903.06733",
    )

    @property
    def sentence(self) -> str:
        """What is wrong, in one plain sentence."""
        return self.value.sentence

    @property
    def part(self) -> str:
        """Which part of the setup is to blame."""
        return self.value.part

    @property
    def title(self) -> str:
        """The name as people write it: 'vanishing gradient'."""
        return self.name.lower().replace("_", " ")
