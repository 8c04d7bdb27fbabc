"""The lab: softmax regression and a small MLP on Fashion-MNIST, with the fused loss or with the losses it replaces."""
