"""The lab: linear regression, softmax regression and an MLP, with the fused loss or with the losses it replaces."""
