"""A short setup for each cause, in which it shows: the page of causes quotes them, the tests run them."""

# ruff: noqa: D102, D103

from __future__ import annotations

# --- all of them share these lines
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import gradmend as gm
from gradmend.diagnosis.course import judge_course

torch.manual_seed(0)
y = torch.arange(256) % 10  # 256 samples of ten classes
x = torch.randn(10, 64)[y] + torch.randn(256, 64)
yes, shares = (y < 5).float()[:, None], F.one_hot(y, 10).float()
amount = x[:, :1] + 0.1 * torch.randn(256, 1)

sgd, adam = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=1e-3)
logits_loss = nn.CrossEntropyLoss()


def net(units=10, *end):
    """A small sound network, and what stands at its end."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, units), *end)


def deep(depth, activation, variance=1 / 3, norm=None):
    """Hidden layers whose weights have `variance` / fan-in; 1/3 is torch's own default."""
    layers = []
    for _ in range(depth):
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight, 0, (variance / 64) ** 0.5)
        layers += [linear, *([norm(64)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Net(nn.Module):
    """Parts, and what is to be done with them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


# --- output, loss, targets, input


def softmax_before_logits_loss():
    return gm.Setup(net(10, nn.Softmax(dim=1)), nn.CrossEntropyLoss(), sgd), (x, y)


def sigmoid_before_logits_loss():
    return gm.Setup(net(1, nn.Sigmoid()), nn.BCEWithLogitsLoss(), sgd), (x, yes)


def logits_before_probability_loss():
    # it takes what log_softmax gives
    return gm.Setup(net(10), nn.NLLLoss(), sgd), (x, y)


def softmax_over_one_unit():
    return gm.Setup(net(1, nn.Softmax(dim=1)), nn.BCELoss(), sgd), (x, yes)


def softmax_over_the_batch():
    def loss(p, target):
        return -(target * p.clamp_min(1e-7).log()).sum(1).mean()

    return gm.Setup(net(10, nn.Softmax(dim=0)), loss, sgd), (x, shares)


def unreachable_targets():
    return gm.Setup(net(1, nn.Sigmoid()), nn.MSELoss(), sgd), (x, 5 * amount)


def wrong_output_count():
    return gm.Setup(net(1), nn.BCEWithLogitsLoss(), sgd), (x, y.float()[:, None])


def unfit_loss():
    return gm.Setup(net(10, nn.Softmax(dim=1)), nn.L1Loss(), sgd), (x, shares)


def mismatched_shapes():
    def loss(output, target):
        return (output - target).square().mean()  # [256, 1] against [256]: [256, 256]

    return gm.Setup(net(1), loss, sgd), (x, amount[:, 0])


def labels_out_of_range():
    # the labels are 1 and 2
    return gm.Setup(net(1), nn.BCEWithLogitsLoss(), sgd), (x, yes + 1)


def constant_labels():
    return gm.Setup(net(10), logits_loss, sgd), (x, torch.full_like(y, 2))


def shuffled_labels():
    return gm.Setup(net(10), logits_loss, sgd), (x, y[torch.randperm(256)])


def class_imbalance():
    rare = (torch.arange(256) % 25 == 0).long()
    return gm.Setup(net(2), logits_loss, sgd), (x, rare)


def unscaled_targets():
    return gm.Setup(net(1), nn.MSELoss(), sgd), (x, 1000 * amount)


def unscaled_input():
    return gm.Setup(net(10), logits_loss, sgd), (1000 * x, y)


def constant_input():
    return gm.Setup(net(10), logits_loss, sgd), (x[:1].repeat(256, 1), y)


def stray_column():
    numbered = torch.cat([x[:, :63], 1e6 + torch.arange(256.0)[:, None]], dim=1)
    return gm.Setup(net(10), logits_loss, sgd), (numbered, y)


# --- how the parts are put together


def wrong_direction():
    def loss(output, target):
        return -F.cross_entropy(output, target)

    return gm.Setup(net(10), loss, sgd), (x, y)


def not_in_optimizer():
    model = net(10)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    return gm.Setup(model, logits_loss, optimizer), (x, y)


def no_gradient():
    model = Net(lambda self, x: self.out(self.body(x).detach()), body=net(32), out=nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, sgd), (x, y)


def frozen_parameters():
    model = net(10)
    model[0].requires_grad_(False)
    return gm.Setup(model, logits_loss, sgd), (x, y)


def eval_mode():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32).eval(), nn.ReLU(), nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, sgd), (x, y)


def input_lost():
    model = Net(lambda self, x: self.body(torch.ones_like(x)), body=net(10))
    return gm.Setup(model, logits_loss, sgd), (x, y)


def batch_of_one():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, sgd), (x[:2], y[:2])


def unfit_batch_size():
    many = x.repeat(7, 1), y.repeat(7)  # all the data in one batch, for five steps
    return gm.Setup(net(10), logits_loss, adam), many, 5


def too_much_dropout():
    layers = [(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.8)) for _ in range(5)]
    model = nn.Sequential(*(part for layer in layers for part in layer), nn.Linear(64, 10))
    return gm.Setup(model, logits_loss, adam), (x, y)


def too_much_weight_decay():
    optimizer = partial(torch.optim.SGD, lr=0.01, weight_decay=10.0)
    return gm.Setup(net(10), logits_loss, optimizer), (x, y)


def too_little_capacity():
    model = net(1, nn.ReLU(), nn.Linear(1, 10))  # all has to pass one unit
    return gm.Setup(model, logits_loss, adam), (x, y)


def learning_rate_too_high():
    return gm.Setup(net(10), logits_loss, partial(torch.optim.SGD, lr=300.0)), (x, y)


def learning_rate_too_low():
    return gm.Setup(net(10), logits_loss, partial(torch.optim.SGD, lr=1e-6)), (x, y), 300


def unfit_optimizer():
    return gm.Setup(net(10), logits_loss, partial(torch.optim.Adam, eps=10.0)), (x, y)


def too_few_steps():
    return gm.Setup(net(10), logits_loss, sgd), (x, y), 2


def denormal_numbers():
    return gm.Setup(deep(25, nn.Sigmoid, 1e-2), logits_loss, sgd), (x, y)


# --- signals and gradients


def symmetric_weights():
    model = net(10)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    return gm.Setup(model, logits_loss, sgd), (x, y)


def contracting_activation():
    return gm.Setup(deep(20, nn.Sigmoid), logits_loss), (x, y)


def vanishing_gradient():
    return gm.Setup(deep(20, nn.ReLU), logits_loss), (x, y)


def weights_too_small():
    return gm.Setup(deep(20, nn.ReLU), logits_loss), (x, y)


def weights_too_large():
    return gm.Setup(deep(20, nn.ReLU, 8.0), logits_loss), (x, y)


def exploding_gradient():
    return gm.Setup(deep(30, nn.ReLU, 4.0), logits_loss), (x, y)


def chaos():
    return gm.Setup(deep(50, nn.Tanh, 4.0), logits_loss), (x, y)


def batch_norm_explosion():
    return gm.Setup(deep(60, nn.ReLU, 2.0, nn.BatchNorm1d), logits_loss), (x, y)


def residual_growth():
    def run(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)

    blocks = [nn.Sequential(nn.ReLU(), nn.Linear(64, 64)) for _ in range(30)]
    for block in blocks:
        nn.init.kaiming_normal_(block[1].weight)
    model = Net(run, layers=nn.ModuleList(blocks), out=nn.Linear(64, 10))
    return gm.Setup(model, logits_loss), (x, y)


def vanishing_through_time():
    # each row is a sequence of 64 steps
    cell = nn.RNN(1, 32, batch_first=True)
    model = Net(lambda self, x: self.out(self.cell(x[..., None])[0][:, -1]), cell=cell, out=nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, adam), (x, y)


def exploding_through_time():
    cell = nn.RNN(1, 32, batch_first=True, nonlinearity="relu")
    nn.init.orthogonal_(cell.weight_hh_l0, 2.5)
    model = Net(lambda self, x: self.out(self.cell(x[..., None])[0][:, -1]), cell=cell, out=nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, adam), (x, y)


def attention_saturation():
    def run(self, x):
        tokens = x.view(len(x), 4, 16)
        return self.out(F.scaled_dot_product_attention(*(40 * self.qkv(tokens)).chunk(3, -1)).mean(1))

    model = Net(run, qkv=nn.Linear(16, 48), out=nn.Linear(16, 10))
    return gm.Setup(model, logits_loss, adam), (x, y)


def attention_collapse():
    def run(self, x):
        tokens = x.view(len(x), 4, 16)
        for qkv in self.layers:  # nothing past the attention: no sum, no MLP
            tokens = F.scaled_dot_product_attention(*qkv(tokens).chunk(3, -1))
        return self.out(tokens).mean(1)

    layers = nn.ModuleList([nn.Linear(16, 48) for _ in range(8)])
    return gm.Setup(Net(run, layers=layers, out=nn.Linear(16, 10)), logits_loss, adam), (x, y)


def information_collapse():
    return gm.Setup(deep(20, nn.Tanh), logits_loss), (x, y)


def shattered_gradients():
    return gm.Setup(deep(45, nn.ReLU, 2.0, nn.BatchNorm1d), logits_loss), (x, y)


def saturated_units():
    return gm.Setup(deep(6, nn.Tanh, 900.0), logits_loss), (x, y)


def dead_units():
    model = net(10)
    nn.init.constant_(model[0].bias, -50.0)
    return gm.Setup(model, logits_loss), (x, y)


def non_finite():
    model = Net(lambda self, x: self.body(x.sqrt()), body=net(10))  # the root of a negative number
    return gm.Setup(model, logits_loss, sgd), (x, y)


# --- the course of a training


def divergence():
    setup = gm.Setup(net(1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.7))
    history = gm.train(setup, [(x, amount)], steps=60)
    return judge_course(history)


def oscillating_loss():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.6)
    setup = gm.Setup(model, nn.L1Loss(), partial(torch.optim.SGD, lr=1.9))
    history = gm.train(setup, [(torch.ones(1, 1), torch.ones(1, 1))], steps=200)
    return judge_course(history)


def slow_convergence():
    setup = gm.Setup(net(10), logits_loss, partial(torch.optim.SGD, lr=0.003))
    history = gm.train(setup, [(x, y)], steps=200)
    return judge_course(history)


def plateau():
    setup = gm.Setup(deep(20, nn.Sigmoid), logits_loss, sgd)
    history = gm.train(setup, [(x, y)], steps=200)
    return judge_course(history)


def overfitting():
    guesses = torch.randint(10, (256,))
    data, held_back = [(x[:128], guesses[:128])], [(x[128:], guesses[128:])]
    setup = gm.Setup(net(10), logits_loss, partial(torch.optim.Adam, lr=0.01))
    history = gm.train(setup, data, validate=held_back, steps=300)
    return judge_course(history)


def dying_units():
    setup = gm.Setup(deep(2, nn.ReLU), logits_loss, partial(torch.optim.Adam, lr=0.3))
    before = gm.measure(setup, (x, y))
    history = gm.train(setup, [(x, y)], steps=30)
    return judge_course(history, before, gm.measure(setup, (x, y)))


# --- small setups, for the remedies


def plain():
    return gm.Setup(net(10), logits_loss, sgd), (x, y)


def bounded():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 10))
    return gm.Setup(model, logits_loss, sgd), (x, y)


def convolutional():
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    return gm.Setup(nn.Sequential(*layers, nn.Linear(144, 10)), logits_loss, sgd), (x.view(-1, 1, 8, 8), y)


def normalized():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return gm.Setup(model, logits_loss, sgd), (x, y)


def gated():
    cell = nn.LSTM(1, 16, batch_first=True)
    model = Net(lambda self, x: self.out(self.cell(x[..., None])[0][:, -1]), cell=cell, out=nn.Linear(16, 10))
    return gm.Setup(model, logits_loss, adam), (x, y)
